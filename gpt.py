# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy"]  # torch warns without numpy
# ///
"""A complete GPT in one file: it reads Shakespeare, one character at a time, then writes.

    python gpt.py                                train on input.txt, then write a sample
    python gpt.py --n_layer=4 --max_iters=5000   the same with other settings
    python gpt.py --resume                       continue after Ctrl-C or a crash (repeat the
                                                 other settings, too)
    python gpt.py --resume --max_iters=0 --prompt=HAMLET:     just sample
    python gpt.py --rung=5                       an earlier model: see the ladder, below

On 2 cores of an AMD EPYC it trains for 37 s (61 s in float32 with AVX2, as on most Intel
laptops) and reaches a validation loss of 1.608 nats per character on Tiny Shakespeare (mean of
three seeds), 1.619 on our input.txt. With a CUDA GPU it trains a larger model for more steps; on
a Mac, --device=mps uses the GPU.

New since bigram.py: embeddings of characters and positions, attention, the MLP, residual
connections, LayerNorm, dropout; mixed precision, warm-up, gradient clipping, weight decay;
checkpoints, top-k sampling, the ladder.
"""
import math, os, signal, sys, time, urllib.request, zlib
import torch
import torch.nn as nn
from torch.nn import functional as F

# ------------------------------------------------------------------ hyperparameters
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # on a Mac 'mps' works, too
if '--device=cpu' in sys.argv:  # the sizes below depend on the device
    device = 'cpu'
# some constants have two values: for a CUDA GPU, and for a laptop
seed = 1337  # same seed + same settings = same model
batch_size = 64 if device == 'cuda' else 16  # sequences per step
block_size = 256 if device == 'cuda' else 64  # context length, in characters
n_layer = 6 if device == 'cuda' else 3  # blocks
n_head = 6 if device == 'cuda' else 4  # attention heads per block
n_embd = 384 if device == 'cuda' else 80  # width of the residual stream
mlp_width = 4  # hidden layer of the MLP, as a multiple of n_embd
dropout = 0.2 if device == 'cuda' else 0.0  # fraction of activations dropped during training
init_gain = 0.8  # initial matrices have standard deviation init_gain / sqrt(columns)
c_proj_gain = 0.3  # likewise for c_proj layers, which write to the residual stream
max_iters = 5000 if device == 'cuda' else 3600  # training steps
learning_rate = 1e-3 if device == 'cuda' else 3e-3  # peak learning rate (tuned for the CPU)
warmup_ratio = 0.04  # fraction of the steps over which the learning rate rises
weight_decay = 0.1  # pulls matrices toward 0
beta2 = 0.99  # AdamW averages squared gradients over 1 / (1 - beta2) steps
grad_clip = 1.0  # clip the gradient norm at this value (0 = do not)
eval_interval = 500 if device == 'cuda' else 1200  # evaluate every this many steps
checkpoint = 'gpt.pt'  # checkpoint file, written at every evaluation
resume = False  # continue from the checkpoint, with its sizes
prompt = ''  # text to continue ('': the first character of the vocabulary, not shown)
temperature = 0.8  # below 1: safer; above 1: more surprising
top_k = 0  # sample from the k most likely characters (0 = all, 1 = greedy)
max_new_tokens = 500  # characters to write
rung = 12  # 2 to 11: an earlier model, whose settings (see the ladder) replace those above

def fastest():
    """bfloat16 where the hardware multiplies it, float16 on older GPUs (T4), else float32."""
    if device == 'cuda':
        return 'bfloat16' if torch.cuda.get_device_capability()[0] >= 8 else 'float16'
    if device == 'cpu' and hasattr(torch.cpu, 'get_capabilities'):  # torch 2.11 or later
        if torch.cpu.get_capabilities().get('avx512_bf16'):
            return 'bfloat16'
    return 'float32'

dtype = fastest()  # precision of matrix products

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
    assert not resume, f'put the input.txt that {checkpoint} was trained on into this folder'
    print('no input.txt in this folder; downloading', url)
    download = urllib.request.urlopen(url, timeout=30).read()  # fails if cut short
    with open('input.txt', 'wb') as file:
        file.write(download)
with open('input.txt', encoding='utf-8-sig') as file:
    text = file.read()
checksum = zlib.crc32(text.encode())
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
# The names are GPT-2's: wte and wpe are the embeddings of tokens and positions, h the blocks,
# ln a LayerNorm, c_attn, c_fc and c_proj linear layers.
class CausalSelfAttention(nn.Module):
    """Each position gathers what it needs from itself and the positions before it."""

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)  # q, k and v of all heads
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)  # mixes the heads
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        # added to the scores in forward: 0 for the past and present, -inf for the future
        mask = torch.full((block_size, block_size), -math.inf).triu(diagonal=1)
        self.register_buffer('mask', mask, persistent=False)

    def forward(self, x):
        B, T, C = x.shape
        head_size = C // n_head
        # query: what am I looking for? key: what do I contain? value: what do I pass on?
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, n_head, head_size).transpose(1, 2)
        v = v.view(B, T, n_head, head_size).transpose(1, 2)
        # the root keeps the spread of the scores the same for every head size
        att = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, T)
        att = att + self.mask[:T, :T]
        att = F.softmax(att, dim=-1)  # each row sums to 1
        y = self.attn_dropout(att) @ v  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

class MLP(nn.Module):
    """Each position processes, on its own, what it has gathered."""

    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, mlp_width * n_embd, bias=False)
        self.c_proj = nn.Linear(mlp_width * n_embd, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))

class Block(nn.Module):
    """Communicate, then compute. Both add to x, the residual stream."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x

class GPT(nn.Module):
    """Embeddings, a stack of blocks, and a head that scores every possible next character."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)  # which character it is
        self.wpe = nn.Embedding(block_size, n_embd)  # its position
        self.drop = nn.Dropout(dropout)
        self.h = nn.Sequential(*[Block() for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # shared weights (Press & Wolf 2017)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                gain = c_proj_gain if 'c_proj' in name else init_gain
                nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss."""
        x = self.wte(idx) + self.wpe.weight[:idx.shape[1]]  # (B, T, n_embd)
        x = self.h(self.drop(x))
        logits = self.lm_head(self.ln_f(x)).float()  # the loss in float32
        if targets is None:
            return logits, None
        # mean of -ln(probability of the right character), in nats
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0):
        """Continue idx (B, T), yielding one new token (B, 1) at a time."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -block_size:])
            logits = logits[:, -1] / temperature  # (B, vocab_size), of the last position
            if top_k > 0:
                kth = logits.topk(min(top_k, vocab_size)).values[:, -1:]
                logits[logits < kth] = -math.inf
            token = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, token), dim=1)
            yield token

# ------------------------------------------------------------------ ladder
# The ladder leads from bigram.py (rung 1) to this model (rung 12). Rungs 2 to 10 add one idea
# each, rungs 11 and 12 add size. Skip this section on a first reading: only --rung uses it.
class AttentionOnly(nn.Module):
    """Rungs 2 and 3."""
    def __init__(self):
        super().__init__()
        self.attn = CausalSelfAttention()

    def forward(self, x):
        return self.attn(x)

class AttentionThenMLP(AttentionOnly):
    """Rungs 4 and 5."""
    def __init__(self):
        super().__init__()
        self.mlp = MLP()

    def forward(self, x):
        return self.mlp(self.attn(x))

class Residual(AttentionThenMLP):
    """Rungs 6 and 7 (He et al. 2015)."""
    def forward(self, x):
        x = x + self.attn(x)
        x = x + self.mlp(x)
        return x

class PostNorm(Block):
    """Rung 8 (Vaswani et al. 2017)."""
    def forward(self, x):
        x = self.ln_1(x + self.attn(x))
        x = self.ln_2(x + self.mlp(x))
        return x

ladder = {  # what each rung changes, on top of all rungs before it
    2: dict(Block=AttentionOnly, n_layer=1, n_head=1, n_embd=64, dropout=0.0, batch_size=32,
            block_size=16, max_iters=4000, learning_rate=3e-3, checkpoint='rung.pt',
            init_gain=1.4, c_proj_gain=1.4),  # larger without residual connections
    3: dict(n_head=4),
    4: dict(Block=AttentionThenMLP, mlp_width=1),
    5: dict(n_layer=3),
    6: dict(Block=Residual, init_gain=0.8, c_proj_gain=0.3),
    7: dict(mlp_width=4),
    8: dict(Block=PostNorm),
    9: dict(Block=Block),  # pre-norm: the model above (GPT-2, Radford et al. 2019)
    10: dict(dropout=0.1),
    11: dict(dropout=0.0, block_size=64, batch_size=16, max_iters=3600),  # too small to overfit
}  # 12: the constants at the top
assert 2 <= rung <= 12, 'rung: 2 to 12 (rung 1 is bigram.py)'
assert rung == 12 or not resume, 'resume only continues rung 12'
if rung < 12:
    for r in range(2, rung + 1):
        globals().update(ladder[r])  # replaces Block, too
    override()  # the command line still wins

# ------------------------------------------------------------------ training
if resume:
    saved = torch.load(checkpoint, map_location=device, weights_only=True)
    assert saved['checksum'] == checksum, f'{checkpoint} was trained on another input.txt'
    globals().update(saved['sizes'])
    override()  # so that other sizes on the command line are refused below
sizes = dict(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
             mlp_width=mlp_width)
assert not resume or sizes == saved['sizes'], f'{checkpoint} was trained with {saved["sizes"]}'
assert n_embd % n_head == 0, f'n_embd ({n_embd}) must be a multiple of n_head ({n_head})'
assert len(val_data) > block_size, f'input.txt needs {10 * block_size + 1} characters'
assert checkpoint and (os.path.isfile(checkpoint) or not os.path.exists(checkpoint)), (
    f'checkpoint: {checkpoint!r} is not a file')
assert temperature > 0, 'temperature must be above 0'

torch.manual_seed(seed)
model = GPT().to(device)
if rung < 9:
    model.ln_f = nn.Identity()  # models before pre-norm have no final norm
print(f'{device}, {dtype}; {sum(p.numel() for p in model.parameters()):,} parameters; '
      f'{len(data):,} characters, {vocab_size} distinct')
matrices = [p for p in model.parameters() if p.dim() == 2]
vectors = [p for p in model.parameters() if p.dim() == 1]  # LayerNorm: not decayed
optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                               {'params': vectors, 'weight_decay': 0.0}],
                              betas=(0.9, beta2), fused=True)
# mixed precision: matrix products in dtype; softmax, LayerNorm and the loss in float32
device_type = torch.device(device).type  # 'cuda:1' -> 'cuda'
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
# only float16 needs it: a larger loss keeps small gradients from rounding to zero
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

@torch.no_grad()
def evaluate(model, tokens):
    """Mean loss over all whole sequences of a text, in nats per character."""
    model.eval()  # dropout off
    n = (len(tokens) - 1) // block_size  # number of whole sequences
    x = tokens[:n * block_size].view(n, block_size)
    y = tokens[1:n * block_size + 1].view(n, block_size)
    total = 0.0
    for xb, yb in zip(x.split(32), y.split(32)):
        with autocast:
            _, loss = model(xb, yb)
        total += loss.item() * len(xb)
    return total / n

def sample(model, n):
    """Write n characters after the prompt, each as soon as it is drawn."""
    model.eval()
    print('-' * 64 + '\n' + prompt, end='')
    idx = torch.tensor([encode(prompt or chars[0])], device=device)  # (1, T)
    for token in model.generate(idx, n, temperature, top_k):
        print(decode(token[0]), end='', flush=True)
    print()

step = 0
train_loss = 0.0  # running mean of about the last 100 steps
best_loss = math.inf  # lowest validation loss
best = {}  # the weights that reached it
if resume:
    model.load_state_dict(saved['model'])
    # use this run's betas and weight decay, not the saved ones
    saved['optimizer']['param_groups'] = optimizer.state_dict()['param_groups']
    optimizer.load_state_dict(saved['optimizer'])
    step, train_loss = saved['step'], saved['train_loss']
    best, best_loss = saved['best'], saved['best_loss']
    print(f'loaded {checkpoint}, saved after step {step}, with {sizes}')

def save():
    """Write a new file, then rename it: a killed run leaves the old file or the new one."""
    torch.save(dict(sizes=sizes, checksum=checksum, step=step, train_loss=train_loss,
                    model=model.state_dict(), optimizer=optimizer.state_dict(),
                    best=best, best_loss=best_loss), checkpoint + '.tmp')
    os.replace(checkpoint + '.tmp', checkpoint)

if step < max_iters:
    open(checkpoint + '.tmp', 'wb').close()  # if files cannot be written, fail now, not later
    if os.path.isfile(checkpoint) and not resume:
        os.replace(checkpoint, checkpoint + '.old')
        print(f'renamed the earlier {checkpoint} to {checkpoint}.old')

stop = False
def interrupt(*_):
    """First Ctrl-C: end training after the current step. Second: stop at once."""
    global stop
    stop = True
    signal.signal(signal.SIGINT, signal.default_int_handler)

signal.signal(signal.SIGINT, interrupt)
start_time = time.time()
while step < max_iters and not stop:
    step += 1
    torch.manual_seed(seed * 10**6 + step)  # so that a resumed run draws the same numbers
    lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # falls to zero
    lr = lr * min(step / (warmup_ratio * max_iters + 1), 1)  # rises from near zero
    for group in optimizer.param_groups:
        group['lr'] = lr
    # forward
    model.train()  # dropout on
    x, y = get_batch()
    with autocast:
        logits, loss = model(x, y)
    # backward, and a step against the gradient
    model.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()

    assert loss < 100, f'the loss is {loss}; lower the learning rate'  # false for nan, too
    train_loss += (loss.item() - train_loss) / min(step, 100)
    if step % max(1, max_iters // 20) == 0 and not stop:
        print(f'{step:6} {"*" * int(15 * train_loss)}')  # 15 stars for each nat
    if step % eval_interval == 0 or step == max_iters:
        val_loss = evaluate(model, val_data)
        assert val_loss < 100, f'the validation loss is {val_loss}; lower the learning rate'
        if val_loss < best_loss:
            best_loss = val_loss
            best = {name: p.clone() for name, p in model.state_dict().items()}
        save()
        print(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
              f'{time.time() - start_time:.1f} s')
        sample(model, 100)
signal.signal(signal.SIGINT, signal.default_int_handler)
if stop:
    save()
    print(f'stopped after step {step}')

# ------------------------------------------------------------------ sampling
if best:
    model.load_state_dict(best)
    print(f'best val loss {best_loss:.4f}, perplexity {math.exp(best_loss):.2f}')
sample(model, max_new_tokens)
