# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy"]  # torch warns without numpy
# ///
"""gpt.py plus the ideas that came after GPT-2, each behind a switch.

    python modern_gpt.py             train on input.txt, then write a sample
    python modern_gpt.py --smear=0   the same without one of the ideas
    python modern_gpt.py --resume    continue (repeat the other settings, too)

On 2 cores of an AMD EPYC it trains for 47 s (86 s in float32 with AVX2, as on most Intel
laptops) and reaches a validation loss of 1.452 nats per character on input.txt (gpt.py: 1.619),
1.430 on Tiny Shakespeare (mean of three seeds; gpt.py: 1.608).

New since gpt.py:
- Muon: updates equally long in all directions, for most of the blocks' matrices (muon)
- epochs: read all of the text before repeating any (epochs)
- SwiGLU: one half of c_fc's output gates the other (activation)
- rotary: queries and keys are rotated by their position (rotary)
- grouped queries: heads share keys and values (n_kv_head)
- head gate: a learned gate on each head's output (head_gate)
- n-grams: strings of 2, 3 and 4 characters have vectors, too (ngram)
- smear: every layer also reads a learned share of the three positions before (smear)
- untied: embedding and output layer have their own weights (tied)
- residual scaling: at the start, blocks add nothing (c_proj_gain)
- QK-norm: LayerNorm of queries and keys (qk_norm)
- RMSNorm: LayerNorm without the mean (rms_norm)
- FlashAttention: attention in one kernel (flash)
- torch.compile: fused operations (use_compile)
- key/value cache: sampling reuses earlier keys and values (kv_cache)
"""
import math, os, signal, sys, time, urllib.request, zlib
import torch
import torch.nn as nn
from torch.nn import functional as F

# ------------------------------------------------------------------ hyperparameters
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # on a Mac 'mps', too (torch 2.6)
if '--device=cpu' in sys.argv:  # the sizes below depend on the device
    device = 'cpu'
# some constants have two values: for a CUDA GPU, and for a laptop
seed = 1337  # same seed + same settings = same model
batch_size = 64 if device == 'cuda' else 8  # sequences per step
block_size = 256  # context length, in characters
n_layer = 6 if device == 'cuda' else 2  # blocks
n_head = 6 if device == 'cuda' else 2  # attention heads per block
n_embd = 384 if device == 'cuda' else 128  # width of the residual stream
mlp_width = 4  # c_fc's outputs / n_embd (SwiGLU keeps half)
dropout = 0.2 if device == 'cuda' else 0.0  # fraction of activations dropped during training
init_gain = 0.8  # initial matrices have standard deviation init_gain / sqrt(columns)
c_proj_gain = 0.0  # likewise for c_proj; at 0, blocks add nothing at first [0.3]
max_iters = 5000 if device == 'cuda' else 1400  # training steps
learning_rate = 2e-3 if device == 'cuda' else 8e-3  # AdamW's peak (tuned for the CPU)
warmup_ratio = 0.03  # fraction of the steps over which the learning rate rises
weight_decay = 0.1  # pulls matrices toward 0
beta2 = 0.99  # AdamW averages squared gradients over 1 / (1 - beta2) steps
grad_clip = 1.0  # clip the gradient norm at this value (0 = do not)
eval_interval = 500 if device == 'cuda' else 700  # evaluate every this many steps
checkpoint = 'modern_gpt.pt'  # checkpoint file, written at every evaluation
resume = False  # continue from the checkpoint, with its sizes
prompt = ''  # text to continue ('': the first character of the vocabulary, not shown)
temperature = 0.8  # below 1: safer; above 1: more surprising
top_k = 0  # sample from the k most likely characters (0 = all, 1 = greedy)
max_new_tokens = 500  # characters to write
# the ideas; gpt.py has the values in [brackets]
muon = True  # Muon for most block matrices; if off, lower learning_rate [False]
muon_learning_rate = 0.02  # Muon's peak rate
epochs = True  # read (nearly) all of the text before repeating any [False]
activation = 'swiglu'  # see activations below ['gelu']
rotary = True  # queries and keys are rotated by position; no wpe [False]
n_kv_head = 3 if device == 'cuda' else 1  # key/value heads (1: multi-query attention) [n_head]
head_gate = True  # a learned gate on the output of each head [False]
tied = False  # share weights between embedding and head [True]
ngram = 4  # strings of up to this many characters have vectors, too [1]
ngram_rows = 16384  # rows in their table; several strings share each row
ngram_decay = 1.5  # its weight decay: high, or it learns rare strings by heart
smear = 3  # earlier positions of which every layer also reads a share [0]
qk_norm = device == 'cuda'  # normalize queries and keys [False]
rms_norm = device == 'cuda'  # RMSNorm instead of LayerNorm [False]
flash = device == 'cuda'  # attention in one kernel [False]
use_compile = False  # torch.compile; needs a C++ compiler [False]
kv_cache = True  # keep keys and values while sampling; when full, start from half [False]

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

def get_batch(step):
    """Sequences x (B = batch_size, T = block_size) for a step (from 1 on); y is x shifted by one
    character."""
    if epochs:  # each epoch cuts the text at a new offset and shuffles the pieces
        pieces = len(train_data) // block_size - 1  # one fewer: the offset needs room
        epoch, batch = divmod(step - 1, max(1, pieces // batch_size))
        rng = torch.Generator().manual_seed(seed * 10**6 + epoch)
        order = torch.randperm(pieces, generator=rng).split(batch_size)[batch]
        start = order[:, None] * block_size + torch.randint(block_size, (1,), generator=rng)
    else:
        start = torch.randint(len(train_data) - block_size, (batch_size, 1))  # (B, 1)
    xy = train_data[(start + torch.arange(block_size + 1)).to(device)]  # (B, T + 1)
    return xy[:, :-1], xy[:, 1:]

# ------------------------------------------------------------------ model
# The names are GPT-2's: wte and wpe are the embeddings of tokens and positions, h the blocks,
# ln a LayerNorm, c_attn, c_fc and c_proj linear layers.
class Smear(nn.Module):
    """Add to each channel learned shares of its values at the positions before (a depthwise
    causal convolution, So et al. 2021; token shift, Peng et al. 2023)."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(smear, n_embd))

    def forward(self, x, cache=None):
        B, T, C = x.shape
        before = cache[self] if cache and self in cache else x.new_zeros(B, smear, C)
        known = torch.cat((before, x), dim=1)  # (B, smear + T, C)
        if cache:
            cache[self] = known[:, T:]
        for i, share in enumerate(self.share, 1):  # share (C,) of the position i places earlier
            x = x + share * known[:, smear - i:smear - i + T]
        return x

def rotate(x, cos, sin):
    """Rotate each pair (i, i + head_size / 2) of channels by its angle (Su et al. 2021)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

class CausalSelfAttention(nn.Module):
    """Each position gathers what it needs from itself and the positions before it."""

    def __init__(self):
        super().__init__()
        head_size = n_embd // n_head
        self.c_attn = nn.Linear(n_embd, n_embd + 2 * n_kv_head * head_size, bias=False)  # q, k, v
        if head_gate:  # Qiu et al. 2025
            self.gate = nn.Linear(n_embd, n_head, bias=False)
        if rotary:  # radians per position, for each pair of channels
            freqs = 10000 ** (-torch.arange(0, head_size, 2) / head_size)
            angle = torch.arange(block_size)[:, None] * freqs  # (block_size, head_size / 2)
            self.register_buffer('cos', angle.cos(), persistent=False)
            self.register_buffer('sin', angle.sin(), persistent=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)  # mixes the heads
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        # added to the scores in forward: 0 for the past and present, -inf for the future
        mask = torch.full((block_size, block_size), -math.inf).triu(diagonal=1)
        self.register_buffer('mask', mask, persistent=False)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        head_size = C // n_head
        # query: what am I looking for? key: what do I contain? value: what do I pass on?
        heads = self.c_attn(x).view(B, T, -1, head_size).transpose(1, 2)
        q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=1)  # (B, heads, T, head_size)
        past = cache['length'] if cache else 0  # positions read earlier
        if qk_norm:  # bounds the scores (Dehghani et al. 2023)
            q, k = F.layer_norm(q, (head_size,)), F.layer_norm(k, (head_size,))
        if rotary:  # scores then depend on how far apart two positions are
            cos = self.cos[past:past + T].to(q.dtype)
            sin = self.sin[past:past + T].to(q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache:
            if past:
                k = torch.cat((cache[self][0], k), dim=2)
                v = torch.cat((cache[self][1], v), dim=2)
            cache[self] = k, v  # before they are repeated: fewer heads, a smaller cache
        if n_kv_head < n_head:  # shared by groups of heads (Ainslie et al. 2023)
            k = k.repeat_interleave(n_head // n_kv_head, dim=1)
            v = v.repeat_interleave(n_head // n_kv_head, dim=1)
        if flash:  # Dao et al. 2022; after the prompt T is 1: no future to mask
            p = dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
        else:
            # the root keeps the spread of the scores the same for every head size
            att = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, past + T)
            att = att + self.mask[past:past + T, :past + T]
            att = F.softmax(att, dim=-1)  # each row sums to 1
            y = self.attn_dropout(att) @ v  # (B, n_head, T, head_size)
        if head_gate:
            gate = 2 * torch.sigmoid(self.gate(x))  # (B, T, n_head), at first 1
            y = y * gate.transpose(1, 2)[..., None]
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

def swiglu(x):
    """One half, passed through SiLU, gates the other (Shazeer 2020)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value

activations = {
    'relu': F.relu,
    'relu2': lambda x: F.relu(x).square(),  # So et al. 2021
    'gelu': F.gelu,  # Hendrycks & Gimpel 2016
    'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x),  # from the same paper
    'swiglu': swiglu,
}

class MLP(nn.Module):
    """Each position processes, on its own, what it has gathered."""

    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, mlp_width * n_embd, bias=False)
        hidden = mlp_width * n_embd // (2 if activation == 'swiglu' else 1)
        self.c_proj = nn.Linear(hidden, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(activations[activation](self.c_fc(x))))

def make_norm():
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016)."""
    return nn.RMSNorm(n_embd) if rms_norm else nn.LayerNorm(n_embd)

class Block(nn.Module):
    """Communicate, then compute. Both add to x, the residual stream."""

    def __init__(self):
        super().__init__()
        self.ln_1 = make_norm()
        self.smear_1 = Smear()
        self.attn = CausalSelfAttention()
        self.ln_2 = make_norm()
        self.smear_2 = Smear()
        self.mlp = MLP()

    def forward(self, x, cache=None):
        x = x + self.attn(self.smear_1(self.ln_1(x), cache), cache)
        x = x + self.mlp(self.smear_2(self.ln_2(x), cache))
        return x

class GPT(nn.Module):
    """Embeddings, a stack of blocks, and a head that scores every possible next character."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)  # which character it is
        if not rotary:
            self.wpe = nn.Embedding(block_size, n_embd)  # its position
        if ngram > 1:
            self.ngrams = nn.Embedding(ngram_rows, n_embd)  # which strings end here
        self.smear = Smear()
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([Block() for _ in range(n_layer)])
        self.ln_f = make_norm()
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight  # shared weights (Press & Wolf 2017)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                gain = c_proj_gain if 'c_proj' in name else init_gain
                if 'gate' in name or 'smear' in name or name == 'lm_head.weight':
                    gain = 0.0  # gates at 1, all characters equally likely, no smear
                nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)

    def forward(self, idx, targets=None, cache=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss.

        With a cache, logits come back only for new positions."""
        T = idx.shape[1]
        past = cache['length'] if cache else 0  # positions read earlier
        x = self.wte(idx[:, past:])  # (B, T - past, n_embd)
        if not rotary:
            x = x + self.wpe.weight[past:T]
        # add vectors for the last 2, 3, ... characters: their hash (by an arbitrary large number)
        # picks the row of a table; strings outnumber rows and share them (Pagnoni et al. 2024)
        row = idx
        for n in range(1, ngram):
            before = F.pad(idx, (n, 0))[:, :T]  # the token n places earlier (0 before the first)
            row = (row * 2_654_435_761 + before) % ngram_rows
            x = x + self.ngrams(row[:, past:])
        x = self.drop(self.smear(x, cache))
        for block in self.h:
            x = block(x, cache)
        if cache:
            cache['length'] = T
        logits = self.lm_head(self.ln_f(x)).float()  # the loss in float32
        if targets is None:
            return logits, None
        # mean of -ln(probability of the right character), in nats
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0):
        """Continue idx (B, T), yielding one new token (B, 1) at a time."""
        idx = idx[:, -block_size:]
        # cache[module]: an attention's keys and values, a Smear's last inputs; length: how many
        # positions have been read
        cache = {'length': 0} if kv_cache else None
        for _ in range(max_new_tokens):
            if cache and idx.shape[1] > block_size:  # the cache is full: reread the last half
                idx = idx[:, -max(1, block_size // 2):]
                cache = {'length': 0}
            logits, _ = self(idx[:, -block_size:], cache=cache)
            logits = logits[:, -1] / temperature  # (B, vocab_size), of the last position
            if top_k > 0:
                kth = logits.topk(min(top_k, vocab_size)).values[:, -1:]
                logits[logits < kth] = -math.inf
            token = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, token), dim=1)
            yield token

# ------------------------------------------------------------------ optimizers
def orthogonalize(x):
    """Matrices x (n, rows, columns) -> same directions, all singular values near 1."""
    if x.shape[1] > x.shape[2]:  # x @ x.mT below is smaller for wide matrices
        return orthogonalize(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values: at most 1
    if dtype == 'bfloat16':
        x = x.bfloat16()
    # Newton-Schulz: singular values v become 3.4445 v - 4.7750 v**3 + 2.0315 v**5;
    # after five rounds nearly all lie between 0.7 and 1.2 (Jordan et al. 2024)
    for _ in range(5):
        s = x @ x.mT
        s = -4.7750 * s + 2.0315 * s @ s
        x = 3.4445 * x + s @ x
    return x

class Muon(torch.optim.Optimizer):
    """A running mean of gradients, made equally long in all directions (Jordan et al. 2024).

    Each group holds matrices of one shape, which are stacked and computed together."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group['params']
            grad = torch.stack([p.grad for p in params])  # (n, rows, columns)
            state = self.state[params[0]]  # one for the whole group
            momentum = state.setdefault('momentum', torch.zeros_like(grad))
            momentum.lerp_(grad, 0.1)  # running mean
            update = orthogonalize(grad.lerp(momentum, 0.9))  # Nesterov: look one step ahead
            rows, columns = params[0].shape
            # the rows of a tall orthogonal matrix are short: scale them to length 1
            update = update * max(1, rows / columns) ** 0.5
            for p, u in zip(params, update):
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.sub_(group['lr'] * u)

def configure_optimizers(model):
    """Muon for c_attn, c_fc and c_proj, AdamW for the rest."""
    by_shape, matrices, table, vectors = {}, [], [], []
    for name, p in model.named_parameters():
        if muon and '.c_' in name:
            by_shape.setdefault(p.shape, []).append(p)
        elif 'ngrams' in name:
            table.append(p)
        elif p.dim() == 2:
            matrices.append(p)
        else:
            vectors.append(p)  # of norms: not decayed
    optimizers = [torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                                     {'params': table, 'weight_decay': ngram_decay},
                                     {'params': vectors, 'weight_decay': 0.0}],
                                    betas=(0.9, beta2), fused=True)]
    if by_shape:
        groups = [{'params': params} for params in by_shape.values()]
        optimizers.append(Muon(groups, dict(lr=0.0, weight_decay=weight_decay)))
    params = [p for o in optimizers for group in o.param_groups for p in group['params']]
    assert sorted(map(id, params)) == sorted(map(id, model.parameters())), 'one optimizer each'
    return optimizers

# ------------------------------------------------------------------ training
if resume:
    saved = torch.load(checkpoint, map_location=device, weights_only=True)
    assert saved['checksum'] == checksum, f'{checkpoint} was trained on another input.txt'
    globals().update(saved['sizes'])
    override()  # so that other sizes on the command line are refused below
sizes = dict(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
             mlp_width=mlp_width, n_kv_head=n_kv_head, activation=activation, rotary=rotary,
             head_gate=head_gate, tied=tied, ngram=ngram, ngram_rows=ngram_rows, smear=smear,
             qk_norm=qk_norm, rms_norm=rms_norm, muon=muon)
assert not resume or sizes == saved['sizes'], f'{checkpoint} was trained with {saved["sizes"]}'
assert n_embd % n_head == 0, f'n_embd ({n_embd}) must be a multiple of n_head ({n_head})'
assert n_head % n_kv_head == 0, f'n_kv_head ({n_kv_head}) must divide n_head ({n_head})'
assert not rotary or n_embd // n_head % 2 == 0, 'rotary: n_embd / n_head must be even'
assert activation in activations, f'activation: one of {", ".join(activations)}'
assert len(val_data) > block_size, f'input.txt needs {10 * block_size + 1} characters'
assert checkpoint and (os.path.isfile(checkpoint) or not os.path.exists(checkpoint)), (
    f'checkpoint: {checkpoint!r} is not a file')
assert temperature > 0, 'temperature must be above 0'

torch.manual_seed(seed)
model = GPT().to(device)
print(f'{device}, {dtype}; {sum(p.numel() for p in model.parameters()):,} parameters; '
      f'{len(data):,} characters, {vocab_size} distinct')
optimizers = configure_optimizers(model)
train_model = torch.compile(model) if use_compile else model
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
    for optimizer, state in zip(optimizers, saved['optimizers']):
        state['param_groups'] = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict(state)
    step, train_loss = saved['step'], saved['train_loss']
    best, best_loss = saved['best'], saved['best_loss']
    print(f'loaded {checkpoint}, saved after step {step}, with {sizes}')

def save():
    """Write a new file, then rename it: a killed run leaves the old file or the new one."""
    torch.save(dict(sizes=sizes, checksum=checksum, step=step, train_loss=train_loss,
                    model=model.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in optimizers],
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
    for optimizer, peak in zip(optimizers, (learning_rate, muon_learning_rate)):
        lr = peak * math.cos(math.pi / 2 * (step - 1) / max_iters)  # falls to zero
        lr = lr * min(step / (warmup_ratio * max_iters + 1), 1)  # rises from near zero
        for group in optimizer.param_groups:
            group['lr'] = lr
    # forward
    model.train()  # dropout on
    x, y = get_batch(step)
    with autocast:
        logits, loss = train_model(x, y)
    # backward, and a step against the gradient
    model.zero_grad()
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    if norm.isfinite():  # else float16 overflowed: skip the step
        for optimizer in optimizers:
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
