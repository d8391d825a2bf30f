# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy"]
# ///
"""The smallest language model: a table of which character follows which.

    python bigram.py                    train on input.txt, then write a sample
    python bigram.py --max_iters=500    the same with another setting

On 2 cores of an Intel Xeon it trains for 2 s and reaches a validation loss of 2.472 nats per
character on input.txt; counting all pairs, without training, gives 2.471. gpt.py is this file
with a transformer in place of the table.
"""
import math, os, signal, sys, time, urllib.request
import torch
import torch.nn as nn
from torch.nn import functional as F

if hasattr(sys.stdout, 'reconfigure'):  # print line by line; '?' for unprintable letters
    sys.stdout.reconfigure(errors='replace', line_buffering=True)

# ------------------------------------------------------------------ hyperparameters
device = 'cpu'  # a table this small needs no GPU
seed = 1337  # same seed + same settings = same model
batch_size = 64  # sequences per step
block_size = 64  # characters per sequence
max_iters = 2000  # training steps
learning_rate = 0.05  # peak learning rate (tuned)
eval_interval = 500  # evaluate every this many steps
prompt = ''  # text to continue ('': start with the first character of the vocabulary)
temperature = 0.8  # below 1: safer; above 1: more surprising
max_new_tokens = 500  # characters to write

def override():
    """Set any constant above for one run, for example with --max_iters=100."""
    if 'get_ipython' in globals() or not os.path.exists(override.__code__.co_filename):
        return  # pasted into a notebook or a console: sys.argv is not ours
    for arg in sys.argv[1:]:
        name, equals, value = arg.removeprefix('--').partition('=')
        kind = type(globals().get(name))
        if not arg.startswith('--') or kind not in (bool, int, float, str):
            sys.exit(f'{arg}: no such setting\n{__doc__}')
        assert equals or kind is bool, f'{arg}: write --{name}=value'
        if kind is bool:
            assert value in ('', 'True', 'False'), f'{arg}: True or False?'
            value = value != 'False'
        globals()[name] = kind(value)

override()

# ------------------------------------------------------------------ data
# input.txt can be any UTF-8 text; if missing, Tiny Shakespeare (Karpathy 2015) is downloaded
url = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
       'data/tinyshakespeare/input.txt')
if not os.path.exists('input.txt'):
    print('no input.txt in this folder; downloading', url)
    download = urllib.request.urlopen(url, timeout=30).read()  # raises if it is cut short
    part = f'input.txt.{os.getpid()}.tmp'
    with open(part, 'wb') as file:
        file.write(download)
    os.replace(part, 'input.txt')
with open('input.txt', encoding='utf-8-sig') as file:
    text = file.read()
chars = sorted(set(text))  # the vocabulary: every character that occurs
vocab_size = len(chars)
stoi = {c: i for i, c in enumerate(chars)}  # character -> token id
encode = lambda s: [stoi[c] for c in s]  # string -> list of token ids
decode = lambda ids: ''.join(chars[i] for i in ids)  # list of token ids -> string
assert set(prompt) <= set(chars), 'prompt: use only characters that occur in input.txt'
data = torch.tensor(encode(text), device=device)
n = int(0.9 * len(data))
train_data = data[:n]
val_data = data[n:]  # the last tenth is never trained on

def get_batch():
    """Random sequences x (B = batch_size, T = block_size); y is x shifted by one character."""
    first = torch.randint(len(train_data) - block_size, (batch_size, 1))
    xy = train_data[(first + torch.arange(block_size + 1)).to(device)]  # (B, T + 1)
    return xy[:, :-1], xy[:, 1:]

# ------------------------------------------------------------------ model
class Bigram(nn.Module):
    """Row i of the table: a score (logit) for each character that may follow character i."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.table.weight)  # at first, all characters are equally likely

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss."""
        logits = self.table(idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0):
        """Continue idx (B, T), yielding one new token (B, 1) at a time."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -1:])  # only the last character matters
            logits = logits[:, -1] / temperature  # (B, vocab_size), of the last position
            token = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, token), dim=1)
            yield token

# ------------------------------------------------------------------ training
assert len(val_data) > block_size, f'input.txt needs {10 * block_size + 1} characters'
assert temperature > 0, 'temperature must be above 0'
assert abs(seed) < 10**12, 'seed: at most 12 digits'  # seed * 10**6 must fit in 64 bits

torch.manual_seed(seed)
model = Bigram().to(device)
# Adam divides a gradient by its usual size + eps; the large eps keeps rare pairs' steps small
optimizer = torch.optim.Adam(model.parameters(), eps=1e-4, fused=True)

@torch.no_grad()
def evaluate():
    """Mean loss over all whole sequences of the validation text, in nats per character."""
    model.eval()
    n = (len(val_data) - 1) // block_size  # number of whole sequences
    x = val_data[:n * block_size].view(n, block_size)
    y = val_data[1:n * block_size + 1].view(n, block_size)
    total = 0.0
    for xb, yb in zip(x.split(32), y.split(32)):
        _, loss = model(xb, yb)
        total += loss.item() * len(xb)
    model.train()
    return total / n

train_loss = 0.0  # running mean of about the last 100 steps
stop = []  # Ctrl-C appends to it
def interrupt(*_):
    """First Ctrl-C: end training after the current step. Second: stop at once."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop.append(True)

signal.signal(signal.SIGINT, interrupt)
start_time = time.time()
for step in range(1, max_iters + 1):
    torch.manual_seed(seed * 10**6 + step)  # random numbers of its own for each step
    lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # falls to zero
    for group in optimizer.param_groups:
        group['lr'] = lr
    x, y = get_batch()
    logits, loss = model(x, y)
    model.zero_grad()
    loss.backward()
    optimizer.step()

    train_loss += (loss.item() - train_loss) / min(step, 100)
    if step % max(1, max_iters // 20) == 0:  # 60 stars: as bad as guessing
        stars = '*' * int(60 * min(1, train_loss / math.log(max(2, vocab_size))))
        print(f'{step:6} {stars}')
    if step % eval_interval == 0 or step == max_iters or stop:
        val_loss = evaluate()
        print(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
              f'{time.time() - start_time:.1f} s')
    if stop:
        break
signal.signal(signal.SIGINT, signal.default_int_handler)

# the same table without training: count all pairs, add one to each count (Laplace smoothing)
# and take the logarithm; the softmax normalizes
pairs = train_data[:-1] * vocab_size + train_data[1:]  # pair (i, j) has number i * vocab_size + j
counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size)
learned = model.table.weight.data
model.table.weight.data = (counts + 1.0).log()
print(f'counting instead of training: val loss {evaluate():.4f}')
model.table.weight.data = learned

# ------------------------------------------------------------------ sampling
model.eval()
print('-' * 64 + '\n' + prompt, end='')
idx = torch.tensor([encode(prompt or chars[0])], device=device)  # (1, T)
for token in model.generate(idx, max_new_tokens, temperature):
    print(decode(token[0]), end='', flush=True)
print()
