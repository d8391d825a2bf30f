# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""gpt.py with ten years of better ideas, each one a setting that can be turned back.

    python modern_gpt.py                  trains on input.txt, then writes
    python modern_gpt.py --smear=0        the same without one of the ideas
    python modern_gpt.py --resume=True    goes on after Ctrl-C, or a crash

The defaults take 94 s (2-core x86 laptop-class CPU) and end at a validation loss of 1.526 nats per
character on input.txt, 1.514 in 83 s on Tiny Shakespeare, where gpt.py ends at 1.603 in 85 s; a GPU
gets a larger model and more steps. What each idea is worth stands in README.md.

What it has and gpt.py has not: SwiGLU, rotary positions, shared keys and values, a look at the
tokens before, layers that start at zero, an untied head; Muon, a straight line to 0, short windows
first; the key/value cache; for a GPU, QK-norm, RMSNorm, FlashAttention and torch.compile. What
gpt.py has and it has not: the ladder, with the switches residual and norm.
"""
import difflib, hashlib, http.client, math, os, pathlib, signal, sys, time, timeit, urllib.request
import torch, torch.nn as nn, torch.nn.functional as F

# ---------------------------------------------------------------- hyperparameters
gpus = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
device = 'cpu' if '--device=cpu' in sys.argv else next((d for d in gpus if gpus[d]), 'cpu')
on_gpu = device == 'cuda'  # then the larger of the two sizes below
dtype = 'auto'  # the type of number in matrix products: 'float32', 'bfloat16', 'float16', 'auto'
seed = 1337  # the same seed and settings give the same losses
batch_size = 64 if on_gpu else 16  # how many windows of text does one step learn from?
block_size = 256 if on_gpu else 128  # how many characters does a window have?
n_layer = 6 if on_gpu else 3  # how many blocks are stacked?
n_head = 6 if on_gpu else 4  # in how many heads does each block look back?
n_embd = 384 if on_gpu else 128  # how many channels carry a character through the blocks?
mlp_width = 4  # how many times wider than that is the MLP inside?
dropout = 0.2 if on_gpu else 0.0  # which share of the activations is zeroed in training?
max_iters = 5000 if on_gpu else 1200  # how many steps of training?
learning_rate = 2e-3 if on_gpu else 8e-3  # how far can a step go? Tuned on Tiny Shakespeare
warmup_iters = 30  # over how many steps does the learning rate rise to that?
weight_decay = 0.1  # how strongly are the matrices pulled towards zero?
beta2 = 0.99  # how long a memory does AdamW have for the size of gradients?
grad_clip = 1.0  # above which length is the gradient cut?
eval_interval = 500  # how many steps lie between two evaluations?
checkpoint = 'modern_gpt.pt'  # where are the weights kept, and all that a resumed run needs?
resume = False  # go on from that file?
prompt = ''  # what does the sample go on from? '': token 0, in most texts the line break
temperature = 0.8  # how daring is the sample? Below 1 it prefers the likely
top_k = 0  # from how many of the likeliest characters is each one drawn? 0: from all
max_new_tokens = 500  # how many characters long is it?
# the ideas, each with gpt.py's choice in brackets: with all of those it computes what gpt.py does
n_kv_head = 3 if on_gpu else 2  # how many heads have keys and values of their own? [n_head]
activation = 'swiglu'  # 'relu', 'relu2' (its square), 'gelu', 'quick_gelu' or this? ['gelu']
rotary = True  # positions by turning queries and keys? Or learned, and added? [False]
rms_norm = on_gpu  # RMSNorm? Or LayerNorm, on a CPU the faster one? [False]
qk_norm = on_gpu  # are queries and keys normalized, so that no score runs away? [False]
flash = on_gpu  # attention as one kernel? On a CPU it is the slower way [False]
zero_init = True  # do the layers start by adding nothing? Or a little? [False]
tied = False  # does the table that reads tokens also make the logits? [True]
smear = 3  # how many tokens before its own does a position see from the start? [0]
channel_dropout = True  # does dropout zero a channel in all of a window? [False]
half_until = 0.5  # for which share of the steps are windows half as long? [0]
muon = True  # Muon for the matrices in the blocks? Or AdamW for all? [False]
muon_learning_rate = 0.02  # how far can a step of Muon go? Tuned on Tiny Shakespeare
linear_decay = 0.8  # for which share of the steps does the rate fall, in a line? [0: a cosine]
kv_cache = True  # does sampling keep the keys and values of what it has read? [False]
use_compile = False  # are the operations of a step fused, by torch.compile? [False]
del on_gpu  # it chose the sizes above and is no setting
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
for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'mlp_width', 'warmup_iters', 'grad_clip'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
if n_embd % n_head: sys.exit(f'n_embd={n_embd} does not divide into n_head={n_head} equal heads')
if rotary and n_embd // n_head % 2: sys.exit(f'n_embd={n_embd}: rotary heads need even sizes')
if n_head % n_kv_head: sys.exit(f'n_head={n_head} does not divide by n_kv_head={n_kv_head}')
if smear < 0: sys.exit(f'smear={smear}: it must be at least 0')
if not 0 <= dropout < 1: sys.exit(f'dropout={dropout}: it must be at least 0 and below 1')
for name in ('half_until', 'linear_decay'):
    if not 0 <= globals()[name] <= 1: sys.exit(f'{name}={globals()[name]}: it must be 0 to 1')
for name, choices in (('activation', ('relu', 'gelu', 'quick_gelu', 'relu2', 'swiglu')),
                      ('dtype', ('auto', 'float32', 'bfloat16', 'float16'))):
    if globals()[name] not in choices: sys.exit(f'{name}={globals()[name]}: not one of {choices}')
if not gpus.get(device, device == 'cpu'): sys.exit(f'device={device}: PyTorch finds {gpus} here')

# number type: bfloat16 halves the traffic and, where the processor has it, the time of a product
def milliseconds(number_type):
    """Time of the fastest of five products of two (512, 512) matrices on the CPU."""
    a = torch.ones(512, 512, dtype=number_type)
    return 1000 * min(timeit.repeat(lambda: a @ a, number=1, repeat=5))

why = 'as set'
if dtype == 'auto' and device.startswith('cuda'):
    major, minor = torch.cuda.get_device_capability(device)
    dtype, why = 'bfloat16' if major >= 8 else 'float16', f'compute capability {major}.{minor}'
elif dtype == 'auto' and device == 'cpu':
    fast, slow = milliseconds(torch.bfloat16), milliseconds(torch.float32)
    dtype = 'bfloat16' if fast < slow else 'float32'
    why = f'a matrix product takes {fast:.1f} ms in bfloat16, {slow:.1f} ms in float32'
elif dtype == 'auto':
    dtype, why = 'float32', 'always so on MPS'
autocast = torch.autocast(device.split(':')[0], getattr(torch, dtype), enabled=dtype != 'float32')
print(f'device {device}: PyTorch finds {gpus} here; {dtype}: {why}')

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

def get_batch(T):
    """Random windows of the training text, x and one character further on y, both (B, T)."""
    start = torch.randint(len(train_data) - T, (batch_size * block_size // T, 1))
    xy = train_data[(start + torch.arange(T + 1)).to(device)]  # (B, T + 1)
    return xy[:, :-1], xy[:, 1:]

# ---------------------------------------------------------------- model
class Cache:
    """The keys and values of the positions read so far, in all layers; room for block_size."""

    def __init__(self, B):
        shape = n_layer, 2, B, n_kv_head, block_size, n_embd // n_head
        self.kv, self.length = torch.zeros(shape, device=device), 0

    def append(self, layer, k, v):
        """k and v of new positions, (B, n_kv_head, T, head_size) -> those of all positions."""
        end = self.length + k.shape[2]  # GPT.logits moves length, once all layers have appended
        self.kv[layer, :, :, :, self.length:end] = torch.stack((k, v))
        return self.kv[layer, :, :, :, :end]

class ChannelDropout(nn.Dropout1d):
    """Dropout of a channel at all positions of a window (Gal & Ghahramani 2016): for a hundredth
    of the random numbers, which are slow to draw on a CPU. (B, T, n_embd) -> (B, T, n_embd)"""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)

make_dropout = ChannelDropout if channel_dropout else nn.Dropout

class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it what it needs (Vaswani et al. 2017).

    Heads can share keys and values: all of them (multi-query, Shazeer 2019) or groups (Ainslie
    et al. 2023). The cache then holds n_kv_head / n_head of what it would."""

    def __init__(self, layer):
        super().__init__()
        self.layer, head_size = layer, n_embd // n_head
        self.c_attn = nn.Linear(n_embd, (n_head + 2 * n_kv_head) * head_size, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)  # mixes what the heads found
        self.attn_dropout = nn.Dropout(0.0 if channel_dropout else dropout)
        self.resid_dropout = make_dropout(dropout)
        # added to the scores: 0 on and below the diagonal, -inf above it, where the future lies
        mask = torch.full((block_size, block_size), -math.inf).triu(diagonal=1)
        self.register_buffer('mask', mask, persistent=False)
        # rotary positions: pair i of channels turns by 10000**(-2i/head_size) at each position
        frequency = 10000 ** -(torch.arange(0, head_size, 2) / head_size)
        angle = torch.arange(block_size).view(-1, 1, 1) * frequency.repeat(2)  # (T, 1, head_size)
        sin = angle.sin()
        sin[..., :head_size // 2] *= -1  # (a, b) turns to (a cos - b sin, b cos + a sin)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', sin, persistent=False)

    def forward(self, x, cache=None):
        """(B, T, n_embd) -> (B, T, n_embd); with a cache, T positions after those in it"""
        B, T, C = x.shape
        past = cache.length if cache else 0
        # query, key, value: what a position looks for, what it has to offer, what it then tells
        qkv = self.c_attn(x).view(B, T, n_head + 2 * n_kv_head, -1)  # (B, T, heads, head_size)
        qk, v = qkv.split((n_head + n_kv_head, n_kv_head), dim=2)
        if qk_norm:  # Dehghani et al. 2023
            qk = F.layer_norm(qk, qk.shape[-1:])
        if rotary:  # Su et al. 2021: a score then depends on how far apart the two positions are
            cos, sin = self.cos[past:past + T].to(qk.dtype), self.sin[past:past + T].to(qk.dtype)
            qk = torch.addcmul(qk * cos, qk.roll(C // n_head // 2, dims=-1), sin)
        q, k = qk.transpose(1, 2).split((n_head, n_kv_head), dim=1)  # (B, heads, T, head_size)
        v = v.transpose(1, 2)
        if cache: k, v = cache.append(self.layer, k, v)
        if flash:  # Dao et al. 2022; one query alone comes after all keys, and needs no mask
            p = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, None, p, is_causal=T > 1, enable_gqa=True)
        else:
            # scaling q rather than the scores: fewer numbers to touch, the same products; the
            # heads that share keys stand below each other, as more rows of one product
            q = (q * (C // n_head)**-0.5).reshape(B, n_kv_head, -1, C // n_head)
            att = (q @ k.transpose(-2, -1)).view(B, n_head, T, past + T)
            att = att + self.mask[past:past + T, :past + T]
            att = F.softmax(att, dim=-1)  # each row sums to 1, the future gets 0
            att = self.attn_dropout(att).to(v.dtype).view(B, n_kv_head, -1, past + T)
            y = (att @ v).view(B, n_head, T, -1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

class MLP(nn.Module):
    """What each position makes of it, on its own."""

    def __init__(self):
        super().__init__()
        hidden = mlp_width * n_embd
        if activation == 'swiglu':  # three matrices of 2/3 the width have as many parameters
            hidden = 8 * math.ceil(hidden / 12)
        gates = hidden if activation == 'swiglu' else 0
        self.c_fc = nn.Linear(n_embd, hidden + gates, bias=False)  # wide
        self.c_proj = nn.Linear(hidden, n_embd, bias=False)  # and back
        self.dropout = make_dropout(dropout)

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        x = self.c_fc(x)
        if activation == 'swiglu':  # Shazeer 2020: a gate for each value
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        elif activation == 'relu2': x = F.relu(x).square()  # So et al. 2021
        elif activation == 'relu': x = F.relu(x)
        elif activation == 'gelu': x = F.gelu(x)  # Hendrycks & Gimpel 2016
        else: x = x * torch.sigmoid(1.702 * x)  # QuickGELU, of the same paper
        return self.dropout(self.c_proj(x))

def make_norm():
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), over the channels."""
    return nn.RMSNorm(n_embd) if rms_norm else nn.LayerNorm(n_embd)

class Block(nn.Module):
    """Positions talk (attention), then think (MLP)."""

    def __init__(self, layer):
        super().__init__()
        self.ln_1, self.attn = make_norm(), CausalSelfAttention(layer)  # each layer has its norm
        self.ln_2, self.mlp = make_norm(), MLP()

    def forward(self, x, cache=None):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)  # which token it is
        if not rotary: self.wpe = nn.Embedding(block_size, n_embd)  # where it stands
        self.smear = nn.Parameter(torch.zeros(smear, n_embd))  # how much of the tokens before
        self.drop = make_dropout(dropout)
        self.h = nn.ModuleList([Block(layer) for layer in range(n_layer)])  # the hidden layers
        self.ln_f = make_norm()  # the final norm
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)  # channels -> logits
        if tied: self.lm_head.weight = self.wte.weight  # one table does both (Press & Wolf 2017)
        # the gains are tuned, on Tiny Shakespeare; a layer whose output is added to the residual
        # stream starts the smaller, the more of them there are (Radford et al. 2019), or at zero
        for name, p in self.named_parameters():
            if name.startswith('h') and p.dim() == 2:
                gain = 0.8 if 'c_proj' not in name else 0 if zero_init else 0.8 / (2 * n_layer)**0.5
                nn.init.normal_(p, std=gain * p.shape[1]**-0.5)
        nn.init.normal_(self.wte.weight, std=0.05)
        if not rotary: nn.init.normal_(self.wpe.weight, std=0.05)
        if not tied: nn.init.zeros_(self.lm_head.weight)

    def logits(self, idx, cache=None):
        """Token ids (B, T) -> logits (B, T, vocab_size); with a cache, of those not yet in it."""
        x = self.wte(idx)  # (B, T, n_embd)
        if not rotary: x = x + self.wpe.weight[:idx.shape[1]]
        x = x + sum(share * F.pad(x, (0, 0, back, 0))[:, :-back]  # shifted by so many positions
                    for back, share in enumerate(self.smear, 1))
        x = self.drop(x)
        if cache: x = x[:, cache.length:]
        for block in self.h: x = block(x, cache)
        if cache: cache.length = idx.shape[1]
        return self.lm_head(self.ln_f(x)).float()

    @autocast  # matrix products in dtype; softmax, LayerNorm and loss in float32
    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss."""
        logits = self.logits(idx)
        if targets is None: return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, on_token=None,
                 use_cache=kv_cache):
        """idx (B, T) -> (B, T + max_new_tokens), sampled; on_token sees each one (B, 1) at once.

        With use_cache only new positions are read, until a window is full."""
        start, cache = max(0, idx.shape[1] - block_size), Cache(len(idx)) if use_cache else None
        for _ in range(max_new_tokens):
            if idx.shape[1] - start > block_size:  # a full cache is made anew from its last half
                start = idx.shape[1] - ((block_size + 1) // 2 if use_cache else block_size)
                cache = Cache(len(idx)) if use_cache else None
            # one position is too little work to pay for casting all weights: no autocast there
            logits = self.logits(idx[:, start:], cache) if use_cache else self(idx[:, start:])[0]
            logits = logits[:, -1] / temperature  # (B, vocab_size)
            if top_k > 0:  # the rest becomes impossible
                logits[logits < logits.topk(min(top_k, vocab_size)).values[:, -1:]] = -math.inf
            idx_next = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)
            if on_token: on_token(idx_next)
        return idx

# ---------------------------------------------------------------- training
@torch.no_grad()
def evaluate():
    """Mean loss over the whole validation split, nats per character; nothing random."""
    model.eval()
    count = len(val_data) - 1  # every character but the first is predicted, once
    pad = (0, -count % block_size)  # fills the last window; a target of -1 is not scored
    x = F.pad(val_data[:-1], pad).view(-1, block_size).split(64)
    y = F.pad(val_data[1:], pad, value=-1).view(-1, block_size).split(64)
    total = sum(model(xb, yb)[1].item() * (yb >= 0).sum().item() for xb, yb in zip(x, y))
    model.train()
    return total / count

def save():
    """Write the checkpoint aside, then move it into place: a kill leaves the old or the new one."""
    state = {'must_fit': must_fit, 'model': model.state_dict(), 'best': best, 'step': step,
             'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
             'random': torch.get_rng_state(), 'losses': losses, 'val_losses': val_losses,
             'seconds': seconds}
    try:
        torch.save(state, checkpoint + '.tmp')
        os.replace(checkpoint + '.tmp', checkpoint)
    except (OSError, RuntimeError) as error:
        sys.exit(f'could not write {checkpoint} ({error}); what was there before is untouched')

def plot():
    """Print the loss as a curve: '.' training (the mean of a column's steps), 'o' validation."""
    curve = F.adaptive_avg_pool1d(torch.tensor([losses]), 64)[0].tolist()
    points = [(loss, i, '.') for i, loss in enumerate(curve)]
    points += [(loss, (i - 1) * 64 // len(losses), 'o') for loss, i in val_losses]
    low, high = min(points)[0], max(points)[0]
    rows = [[' '] * 64 for _ in range(11)]
    for loss, column, mark in points:
        rows[round((high - loss) / (high - low + 1e-9) * 10)][column] = mark
    for i, row in enumerate(rows):
        print(f'{high - i * (high - low) / 10:5.2f} |' + ''.join(row))
    print(f"{'step 1':>12}{'. training loss, o validation loss':^44}step {len(losses)}")

class Optimizers:
    """Several optimizers that look like one; each parameter of the model must be in just one."""

    def __init__(self, *parts):
        self.parts = parts
        params = [id(p) for group in self.param_groups for p in group['params']]
        assert sorted(params) == sorted(id(p) for p in model.parameters())

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self):
        for part in self.parts: part.zero_grad()

    def step(self):
        for part in self.parts: part.step()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states): part.load_state_dict(state)

torch.manual_seed(seed)
model = GPT().to(device)
print(f'{len(data):,} characters, {vocab_size} different; '
      f'{sum(p.numel() for p in model.parameters()):,} parameters')
print(f'key/value cache: {Cache(1).kv.nbytes / 1024:.0f} KiB for a window; '
      f'{n_kv_head} heads of {n_head} have keys and values of their own')
matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
inner = [p for name, p in matrices.items() if muon and name.startswith('h.')]  # in the blocks
outer = [p for name, p in matrices.items() if not (muon and name.startswith('h.'))]
vectors = [p for p in model.parameters() if p.dim() == 1]  # the norms': no pull towards zero
parts = [torch.optim.AdamW([{'params': outer, 'weight_decay': weight_decay},
                            {'params': vectors, 'weight_decay': 0.0}],
                           betas=(0.9, beta2), fused=True)]
if muon:  # Jordan 2024: a step along the gradient with all its directions made equally long
    inner = {'params': inner, 'ratio': muon_learning_rate / learning_rate}
    parts.append(torch.optim.Muon([inner], weight_decay=weight_decay))
optimizer, train_model = Optimizers(*parts), model
if use_compile:
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))  # fails where there is no compiler
        train_model = torch.compile(model)
    except Exception as error:
        print(f'use_compile: not here, so without it ({error})'.splitlines()[0])
scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')
step, losses, val_losses, seconds, best = 0, [], [], 0.0, model.state_dict()
must_fit = {'script': 'modern_gpt.py', 'chars': ''.join(chars)}
must_fit |= {name: globals()[name] for name in (
    'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'mlp_width', 'activation', 'rotary',
    'rms_norm', 'qk_norm', 'tied', 'smear', 'muon')}
if resume:
    try:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        misfits = [f'{k}={v!r}'[:60] for k, v in saved['must_fit'].items()
                   if v != must_fit.get(k)]
    except Exception as error:  # a damaged file fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        sys.exit(f'cannot resume from {checkpoint}: {reason}')
    if misfits: sys.exit(f'cannot resume: {checkpoint} was made with {", ".join(misfits)}')
    model.load_state_dict(saved['model'])
    optimizer.load_state_dict(saved['optimizer'])
    scaler.load_state_dict(saved['scaler'])
    torch.set_rng_state(saved['random'].cpu())
    step, losses, val_losses, seconds, best = (
        saved[name] for name in ('step', 'losses', 'val_losses', 'seconds', 'best'))
    print(f'resumed from {checkpoint} after step {step}')

interrupts = []  # Ctrl-C makes the step at hand the last one
signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
clear = '\r' + ' ' * 79 + '\r' if sys.stdout.isatty() else ''  # a file gets no progress line
start, shown, first = time.time() - seconds, 0.0, step + 1
for step in range(first, max_iters + 1):
    lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # a quarter of a cosine
    if linear_decay:  # constant, then straight down
        lr = learning_rate * min(1, (max_iters + 1 - step) / (linear_decay * max_iters))
    lr *= min(1, step / warmup_iters)
    for group in optimizer.param_groups: group['lr'] = lr * group.get('ratio', 1)
    window = max(1, block_size // 2) if step <= half_until * max_iters else block_size
    logits, loss = train_model(*get_batch(window))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())
    last = step == max_iters or bool(interrupts)
    val_loss = evaluate() if step % eval_interval == 0 or last else None
    if not math.isfinite(losses[-1] + (val_loss or 0)):  # before it can reach the checkpoint
        sys.exit(f'{clear}step {step}: the loss is not finite: try a lower learning_rate than '
                 f'{learning_rate}; {checkpoint} is as it was')
    seconds = time.time() - start
    speed = step * batch_size * block_size / seconds  # tokens per second
    if val_loss is not None:
        val_losses.append((val_loss, step))
        best_loss, best_step = min(val_losses)
        loss = sum(losses[-100:]) / len(losses[-100:])  # of the last hundred steps
        print(f'{clear}step {step:4}: train loss {loss:.4f}, val loss {val_loss:.4f}, '
              f'{seconds:.1f} s', flush=True)
        if best_step == step: best = {name: t.clone() for name, t in model.state_dict().items()}
        if best_step == step or last: save()
        if last: break
    elif clear and seconds > shown + 0.2:
        shown = seconds
        print(f'{clear}step {step}/{max_iters}, loss {losses[-1]:.4f}, {speed:,.0f} tokens/s, '
              f'{seconds / step * (max_iters - step):.0f} s left', end='', flush=True)
if first <= max_iters:
    plot()
    print(f'best val loss {best_loss:.4f} (step {best_step}), perplexity '
          f'{torch.tensor(best_loss).exp():.2f}, {seconds:.1f} s, {speed:,.0f} tokens/s')

# ---------------------------------------------------------------- sampling
signal.signal(signal.SIGINT, lambda *_: sys.exit())  # all is saved: Ctrl-C just ends the sample
model.load_state_dict(best)
model.eval()
if kv_cache:  # what that buys, in a text longer than a window
    write = lambda use_cache: model.generate(data[None, :block_size], block_size,
                                             use_cache=use_cache)
    with torch.random.fork_rng():  # the sample below is the same, timed or not
        fast, slow = (block_size / timeit.timeit(lambda: write(use_cache), number=1)
                      for use_cache in (True, False))
    print(f'sampling: {fast:,.0f} tokens/s; without the key/value cache {slow:,.0f} tokens/s')
idx = torch.tensor([encode(prompt) or [0]], device=device)  # (1, T)
print('-' * 64 + '\n' + prompt, end='')
model.generate(idx, max_new_tokens, temperature, top_k,
               lambda token: print(decode(token[0]), end='', flush=True))
print()
