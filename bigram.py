# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""The smallest language model, a table of what follows what. To run it: python bigram.py
Training takes 4 s (2-core x86 laptop-class CPU) and ends at 2.472 nats per character on the last
tenth of input.txt; counting all pairs, with no training, gives 2.471. gpt.py is this file grown."""
import difflib, hashlib, http.client, math, os, pathlib, sys, time, urllib.request
import torch, torch.nn as nn, torch.nn.functional as F

# ---------------------------------------------------------------- hyperparameters
gpus = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
device = 'cpu' if '--device=cpu' in sys.argv else next((d for d in gpus if gpus[d]), 'cpu')
seed = 1337  # the same seed and settings give the same losses
batch_size = 64  # how many windows of text does one step learn from?
block_size = 64  # how many characters does a window have?
max_iters = 2000  # how many steps of training?
learning_rate = 0.05  # how far can a step go? Tuned on input.txt; it falls to zero in the end
eval_interval = 500  # how many steps lie between two evaluations?
prompt = ''  # what does the sample go on from? '': token 0, in most texts the line break
temperature = 1.0  # how daring is the sample? Below 1 it prefers the likely
top_k = 0  # from how many of the likeliest characters is each one drawn? 0: from all
max_new_tokens = 300  # how many characters long is it?
# overrides: --name=value sets one of these for one run (in a notebook, argv is the kernel's)
settings = {k: v for k, v in globals().items() if isinstance(v, (int, float, str)) and k[0] != '_'}
for arg in sys.argv[1:] if __name__ == '__main__' and 'launcher.py' not in sys.argv[0] else []:
    name, _, value = arg[2:].partition('=')
    kind = type(settings.get(name))
    try:
        globals()[name] = {'True': True, 'False': False}[value] if kind is bool else kind(value)
    except (KeyError, TypeError, ValueError):
        near = difflib.get_close_matches(name, settings, 1, cutoff=0)[0]
        sys.exit(f'{arg}: do you mean --{near}={settings[near]} ({type(settings[near]).__name__})?')
for name in ('batch_size', 'block_size', 'eval_interval', 'temperature'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
if not gpus.get(device, device == 'cpu'): sys.exit(f'device={device}: PyTorch finds {gpus} here')
print(f'device {device}: PyTorch finds {gpus} here')

# ---------------------------------------------------------------- data
source = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
try:
    if not os.path.exists('input.txt'):  # fetch Tiny Shakespeare (Karpathy 2015), all or nothing
        raw = urllib.request.urlopen(source, timeout=30).read()
        if hashlib.sha256(raw).hexdigest()[:16] != '86c4e6aa9db7c042': raise OSError('damaged')
        pathlib.Path('input.txt.tmp').write_bytes(raw)
        os.replace('input.txt.tmp', 'input.txt')
    text = pathlib.Path(source := 'input.txt').read_text(encoding='utf-8')
except (OSError, UnicodeError, http.client.HTTPException) as error:
    sys.exit(f'{source}: {error}; put a text of your own, in UTF-8, into input.txt in this folder')
chars = sorted(set(text))  # the vocabulary: each character of the text is a token
vocab_size, stoi = len(chars), {c: i for i, c in enumerate(chars)}
encode = lambda s: [stoi[c] for c in s]  # string -> list of token ids
decode = lambda ids: ''.join(chars[i] for i in ids)  # list of token ids -> string
data = torch.tensor(encode(text), device=device)
n = int(0.9 * len(data))  # learn from the first nine tenths, be judged on the rest
train_data, val_data = data[:n], data[n:]
if n <= block_size or n > len(data) - 2: sys.exit(f'input.txt: {len(data)} characters are too few')
if set(prompt) - set(chars): sys.exit(f'prompt: {set(prompt) - set(chars)} not in input.txt')

def get_batch():
    """Random windows of the training text, x and one character further on y, both (B, T)."""
    start = torch.randint(len(train_data) - block_size, (batch_size, 1))
    xy = train_data[(start + torch.arange(block_size + 1)).to(device)]  # (B, T + 1)
    return xy[:, :-1], xy[:, 1:]

# ---------------------------------------------------------------- model
class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, vocab_size)  # row i: the logits of what follows token i
        nn.init.zeros_(self.wte.weight)  # nothing known yet: the first loss is ln(vocab_size)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss."""
        logits = self.wte(idx)
        if targets is None: return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, on_token=None):
        """idx (B, T) -> (B, T + max_new_tokens), sampled; on_token sees each one (B, 1) at once."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -block_size:])[0][:, -1] / temperature  # (B, vocab_size)
            if top_k > 0:  # the rest becomes impossible
                logits[logits < logits.topk(min(top_k, vocab_size)).values[:, -1:]] = -math.inf
            idx_next = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)
            if on_token: on_token(idx_next)
        return idx

# ---------------------------------------------------------------- training
torch.manual_seed(seed)
model = Bigram().to(device)
# a large eps holds back the pairs that are hardly ever seen, as adding one to a count does below
optimizer = torch.optim.AdamW(model.parameters(), eps=1e-4, weight_decay=0.0, fused=True)
start = time.time()
for step in range(1, max_iters + 1):
    lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # a quarter of a cosine
    for group in optimizer.param_groups: group['lr'] = lr
    logits, loss = model(*get_batch())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % eval_interval == 0 or step == max_iters:
        val_loss = model(val_data[None, :-1], val_data[None, 1:])[1]
        print(f'step {step:4}: train loss {loss:.4f}, val loss {val_loss:.4f}, '
              f'{time.time() - start:.1f} s', flush=True)

# The same table with no training: count all pairs, one more for each (Laplace 1812), and divide
counts = torch.bincount(train_data[:-1] * vocab_size + train_data[1:], minlength=vocab_size**2)
logits = (counts + 1.0).log().view(vocab_size, vocab_size)  # the softmax does the division
print(f'counting:  val loss {F.cross_entropy(logits[val_data[:-1]], val_data[1:]):.4f}')

# ---------------------------------------------------------------- sampling
idx = torch.tensor([encode(prompt) or [0]], device=device)  # (1, T)
print('-' * 64 + '\n' + prompt, end='')
model.generate(idx, max_new_tokens, temperature, top_k,
               lambda token: print(decode(token[0]), end='', flush=True))
print()
