# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy"]  # torch warns without numpy
# ///
"""The smallest language model: a table of which character follows which.

    python bigram.py                    train on input.txt, then write a sample
    python bigram.py --max_iters=500    the same with another setting

On 2 cores of an AMD EPYC it trains for 1 s, to 2.472 nats per character of input.txt (validation
loss); counting all pairs, without training, gives 2.471. gpt.py is this file with a transformer.
"""
import math, os, sys, time, urllib.request
import torch
import torch.nn as nn
from torch.nn import functional as F

# ------------------------------------------------------------------ hyperparameters
device = 'cpu'  # a table this small needs no GPU
seed = 1337  # same seed + same settings = same model
batch_size = 64  # sequences per step
block_size = 64  # characters per sequence
max_iters = 2000  # training steps
learning_rate = 0.05  # peak learning rate (tuned)
eval_interval = 500  # evaluate every this many steps
prompt = ''  # text to continue ('': the first character of the vocabulary, not shown)
temperature = 0.8  # below 1: safer; above 1: more surprising
max_new_tokens = 500  # characters to write

def override():
    """Set any constant above for one run, for example with --max_iters=100."""
    if os.path.basename(sys.argv[0]) != os.path.basename(override.__code__.co_filename):
        return  # imported or in a notebook: the arguments are another program's
    for arg in sys.argv[1:]:
        name, equals, value = arg.removeprefix('--').partition('=')
        kind = type(globals().get(name))
        if not arg.startswith('--') or kind not in (bool, int, float, str):
            sys.exit(f'{arg}: the settings are the constants at the top\n{__doc__}')
        assert equals or kind is bool, f'{arg}: write --{name}=value'
        if kind is bool:
            assert value in ('', 'True', 'False'), f'{arg}: True or False?'
            value = value != 'False'
        if kind is int and not value.lstrip('-').isdigit():
            sys.exit(f'{arg}: not a whole number (for fractions, write {name} = 1.0 at the top)')
        globals()[name] = kind(value)

override()
if hasattr(sys.stdout, 'reconfigure'):  # print line by line; '?' for unprintable letters
    sys.stdout.reconfigure(errors='replace', line_buffering=True)

# ------------------------------------------------------------------ data
# input.txt can be any UTF-8 text; if missing, Tiny Shakespeare (Karpathy 2015) is downloaded
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
if not os.path.exists('input.txt'):
    print('no input.txt in this folder; downloading', url)
    download = urllib.request.urlopen(url, timeout=30).read()  # fails if cut short
    with open('input.txt', 'wb') as file:
        file.write(download)
with open('input.txt', encoding='utf-8-sig') as file:
    text = file.read()
chars = sorted(set(text))  # the vocabulary: every character that occurs
vocab_size = len(chars)
stoi = {c: i for i, c in enumerate(chars)}  # character -> token id
encode = lambda s: [stoi[c] for c in s]  # string -> list of token ids
decode = lambda ids: ''.join(chars[i] for i in ids)  # list of token ids -> string
assert set(prompt) <= set(chars), f'prompt: not in input.txt: {set(prompt) - set(chars)}'
data = torch.tensor(encode(text), device=device)
n = max(int(0.9 * len(data)), len(data) - 1_000_000)
train_data = data[:n]
val_data = data[n:]  # the last tenth (at most a million) is never trained on

def get_batch():
    """Random sequences x (B = batch_size, T = block_size); y is x shifted by one character."""
    start = torch.randint(len(train_data) - block_size, (batch_size, 1))  # (B, 1)
    xy = train_data[(start + torch.arange(block_size + 1)).to(device)]  # (B, T + 1)
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
        # mean of -ln(probability of the right character), in nats
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

torch.manual_seed(seed)
model = Bigram().to(device)
# step = gradient / (usual gradient + eps): a large eps keeps rare pairs from taking full steps
optimizer = torch.optim.Adam(model.parameters(), eps=1e-4, fused=True)

@torch.no_grad()
def evaluate(model, tokens):
    """Mean loss over all whole sequences of a text, in nats per character."""
    n = (len(tokens) - 1) // block_size  # number of whole sequences
    x = tokens[:n * block_size].view(n, block_size)
    y = tokens[1:n * block_size + 1].view(n, block_size)
    total = 0.0
    for xb, yb in zip(x.split(32), y.split(32)):
        _, loss = model(xb, yb)
        total += loss.item() * len(xb)
    return total / n

def sample(model, n):
    """Write n characters after the prompt, each as soon as it is drawn."""
    print('-' * 64 + '\n' + prompt, end='')
    idx = torch.tensor([encode(prompt or chars[0])], device=device)  # (1, T)
    for token in model.generate(idx, n, temperature):
        print(decode(token[0]), end='', flush=True)
    print()

train_loss = 0.0  # running mean of about the last 100 steps
start_time = time.time()
for step in range(1, max_iters + 1):
    lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # falls to zero
    for group in optimizer.param_groups:
        group['lr'] = lr
    # forward
    x, y = get_batch()
    logits, loss = model(x, y)
    # backward, and a step against the gradient
    model.zero_grad()
    loss.backward()
    optimizer.step()

    assert loss < 100, f'the loss is {loss}; lower the learning rate'  # false for nan, too
    train_loss += (loss.item() - train_loss) / min(step, 100)
    if step % max(1, max_iters // 20) == 0:
        print(f'{step:6} {"*" * int(15 * train_loss)}')  # 15 stars for each nat
    if step % eval_interval == 0 or step == max_iters:
        val_loss = evaluate(model, val_data)
        print(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
              f'{time.time() - start_time:.1f} s')

# the same table without training: count the pairs, add one to each count (Laplace smoothing)
# and take the logarithm, because the loss applies softmax
pairs = train_data[:-1] * vocab_size + train_data[1:]  # each pair as one number
counts = 1 + pairs.bincount(minlength=vocab_size**2).view(vocab_size, vocab_size)
counted = Bigram()
counted.table = nn.Embedding.from_pretrained(counts.log())
print(f'counting instead of training: val loss {evaluate(counted, val_data):.4f}')

# ------------------------------------------------------------------ sampling
sample(model, max_new_tokens)
