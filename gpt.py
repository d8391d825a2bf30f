# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""A GPT that learns to write, character by character: all of it, in one file.

    python gpt.py                    trains on input.txt, then writes
    python gpt.py --rung=5           trains the model of rung 5 of the ladder, see below
    python gpt.py --resume=True      goes on after Ctrl-C, or a crash
    python gpt.py --resume=True --max_iters=0 --prompt=HAMLET:     only writes

The defaults take 80 s (2-core x86 laptop-class CPU) and end at a validation loss of 1.627 nats per
character on input.txt, 1.603 in 85 s on Tiny Shakespeare; a GPU gets a larger model and more steps.

What it has and bigram.py has not: attention, MLPs, residuals and LayerNorm in a stack of blocks;
number types, warm-up, gradient clipping, dropout; evaluation by windows, a checkpoint, progress.
"""
import difflib, hashlib, http.client, math, os, pathlib, signal, sys, time, timeit, urllib.request
import torch, torch.nn as nn, torch.nn.functional as F

# ---------------------------------------------------------------- hyperparameters
gpus = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
device = 'cpu' if '--device=cpu' in sys.argv else next((d for d in gpus if gpus[d]), 'cpu')
on_gpu = device == 'cuda'  # then the larger of the two sizes below
dtype = 'auto'  # the type of number in matrix products: 'float32', 'bfloat16', 'float16', 'auto'
seed = 1337  # the same seed and settings give the same losses
batch_size = 64 if on_gpu else 32  # how many windows of text does one step learn from?
block_size = 256 if on_gpu else 64  # how many characters does a window have?
n_layer = 6 if on_gpu else 3  # how many blocks are stacked?
n_head = 6 if on_gpu else 4  # in how many heads does each block look back?
n_embd = 384 if on_gpu else 128  # how many channels carry a character through the blocks?
mlp_width = 4  # how many times wider than that is the MLP inside? 0: no MLP
residual = True  # does a layer add to its input? False: it replaces it
norm = 'pre'  # LayerNorm before each layer ('pre', GPT-2), after it ('post', 2017), or 'none'?
dropout = 0.2 if on_gpu else 0.0  # which share of the activations is zeroed in training?
max_iters = 5000 if on_gpu else 1500  # how many steps of training?
learning_rate = 1e-3 if on_gpu else 4e-3  # how far can a step go? Tuned on Tiny Shakespeare
warmup_iters = 100  # over how many steps does the learning rate rise to that?
weight_decay = 0.1  # how strongly are the matrices pulled towards zero?
beta2 = 0.99  # how long a memory does AdamW have for the size of gradients?
grad_clip = 1.0  # above which length is the gradient cut?
eval_interval = 500  # how many steps lie between two evaluations?
checkpoint = 'gpt.pt'  # where are the weights kept, and all that a resumed run needs?
resume = False  # go on from that file?
prompt = ''  # what does the sample go on from? '': token 0, in most texts the line break
temperature = 0.8  # how daring is the sample? Below 1 it prefers the likely
top_k = 0  # from how many of the likeliest characters is each one drawn? 0: from all
max_new_tokens = 500  # how many characters long is it?
rung = 12  # which step of the ladder? 12 is the constants above; rung r sets the lines 2 to r, too
ladder = {
    2: dict(n_layer=1, n_head=1, n_embd=64, mlp_width=0, residual=False, norm='none', dropout=0.0,
            batch_size=32, block_size=16, max_iters=4000, learning_rate=3e-3),  # one attention head
    3: dict(n_head=4),  # several heads
    4: dict(mlp_width=1),  # an MLP after the attention
    5: dict(n_layer=3),  # three blocks
    6: dict(residual=True),  # residual connections
    7: dict(mlp_width=4),  # the MLP four times wider
    8: dict(norm='post'),  # LayerNorm after each layer, as in 2017
    9: dict(norm='pre'),  # LayerNorm before it, as in GPT-2
    10: dict(dropout=0.1),  # dropout
    11: dict(n_embd=88, block_size=64, dropout=0.0, max_iters=2000),  # bigger: 300 K parameters
}
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
for r in range(2, rung + 1 if rung < 12 else 0):  # what the command line says outranks the ladder
    globals().update({k: v for k, v in ladder[r].items() if f'--{k}=' not in ' '.join(sys.argv)})
for name in ('batch_size', 'block_size', 'eval_interval', 'temperature'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
for name in ('n_layer', 'n_head', 'n_embd', 'warmup_iters', 'grad_clip'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
if n_embd % n_head: sys.exit(f'n_embd={n_embd} does not divide into n_head={n_head} equal heads')
if not 0 <= dropout < 1: sys.exit(f'dropout={dropout}: it must be at least 0 and below 1')
for name, choices in (('norm', ('pre', 'post', 'none')),
                      ('dtype', ('auto', 'float32', 'bfloat16', 'float16'))):
    if globals()[name] not in choices: sys.exit(f'{name}={globals()[name]}: not one of {choices}')
if not 2 <= rung <= 12: sys.exit(f'rung={rung}: it must be 2 to 12 (rung 1 is bigram.py)')
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

def get_batch():
    """Random windows of the training text, x and one character further on y, both (B, T)."""
    start = torch.randint(len(train_data) - block_size, (batch_size, 1))
    xy = train_data[(start + torch.arange(block_size + 1)).to(device)]  # (B, T + 1)
    return xy[:, :-1], xy[:, 1:]

# ---------------------------------------------------------------- model
class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it what it needs (Vaswani et al. 2017)."""

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)  # q, k and v of all heads at once
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)  # mixes what the heads found
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        # added to the scores: 0 on and below the diagonal, -inf above it, where the future lies
        mask = torch.full((block_size, block_size), -math.inf).triu(diagonal=1)
        self.register_buffer('mask', mask, persistent=False)

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        B, T, C = x.shape
        # query, key, value: what a position looks for, what it has to offer, what it then tells
        q, k, v = (z.view(B, T, n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
                   for z in self.c_attn(x).split(n_embd, dim=2))
        # scaling q rather than the scores: fewer numbers to touch, the same products
        att = (q * (C // n_head)**-0.5) @ k.transpose(-2, -1)  # (B, n_head, T, T)
        att = F.softmax(att + self.mask[:T, :T], dim=-1)  # each row sums to 1, the future gets 0
        y = self.attn_dropout(att).to(v.dtype) @ v  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

class MLP(nn.Module):
    """What each position makes of it, on its own."""

    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, mlp_width * n_embd, bias=False)  # wide
        self.c_proj = nn.Linear(mlp_width * n_embd, n_embd, bias=False)  # and back
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))  # GELU: Hendrycks & Gimpel 2016

def make_norm():
    """LayerNorm (Ba et al. 2016): mean 0, variance 1 over channels; learned scale and shift."""
    return nn.Identity() if norm == 'none' else nn.LayerNorm(n_embd)

class Block(nn.Module):
    """Positions talk (attention), then think (MLP): x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = make_norm(), CausalSelfAttention()  # each layer has its norm
        self.ln_2, self.mlp = make_norm(), MLP() if mlp_width else None

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        x = self.step(x, self.ln_1, self.attn)
        return self.step(x, self.ln_2, self.mlp) if mlp_width else x

    def step(self, x, ln, layer):
        """x + layer(ln(x)), or what the settings norm and residual make of it."""
        y = layer(ln(x) if norm == 'pre' else x)
        y = x + y if residual else y
        return ln(y) if norm == 'post' else y

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)  # which token it is
        self.wpe = nn.Embedding(block_size, n_embd)  # where it stands
        self.drop = nn.Dropout(dropout)
        self.h = nn.Sequential(*[Block() for _ in range(n_layer)])  # the hidden layers
        self.ln_f = make_norm() if norm == 'pre' else nn.Identity()  # the final norm
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)  # channels -> logits
        self.lm_head.weight = self.wte.weight  # one table reads and writes (Press & Wolf 2017)
        # the gains are tuned, on Tiny Shakespeare; a layer whose output is added to the residual
        # stream starts the smaller, the more of them there are (Radford et al. 2019)
        for name, p in self.named_parameters():
            if name.startswith('h') and p.dim() == 2:
                added = residual and 'c_proj' in name
                gain = 0.8 / (2 * n_layer)**0.5 if added else 0.8 if residual else 1.4
                nn.init.normal_(p, std=gain * p.shape[1]**-0.5)
        nn.init.normal_(self.wte.weight, std=0.05)
        nn.init.normal_(self.wpe.weight, std=0.05)

    @autocast  # matrix products in dtype; softmax, LayerNorm and loss in float32
    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss."""
        x = self.drop(self.wte(idx) + self.wpe.weight[:idx.shape[1]])  # (B, T, n_embd)
        logits = self.lm_head(self.ln_f(self.h(x))).float()
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

torch.manual_seed(seed)
model = GPT().to(device)
print(f'{len(data):,} characters, {vocab_size} different; '
      f'{sum(p.numel() for p in model.parameters()):,} parameters')
matrices = [p for p in model.parameters() if p.dim() == 2]
vectors = [p for p in model.parameters() if p.dim() == 1]  # LayerNorm's: no pull towards zero
optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                               {'params': vectors, 'weight_decay': 0.0}],
                              betas=(0.9, beta2), fused=True)
scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')
step, losses, val_losses, seconds, best = 0, [], [], 0.0, model.state_dict()
must_fit = {'script': 'gpt.py', 'chars': ''.join(chars), 'rung': rung, 'block_size': block_size,
            'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd, 'mlp_width': mlp_width,
            'residual': residual, 'norm': norm}
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
    lr *= min(1, step / warmup_iters)  # (half of one, Loshchilov & Hutter 2017, ends 0.02 higher)
    for group in optimizer.param_groups: group['lr'] = lr
    logits, loss = model(*get_batch())
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
idx = torch.tensor([encode(prompt) or [0]], device=device)  # (1, T)
print('-' * 64 + '\n' + prompt, end='')
model.generate(idx, max_new_tokens, temperature, top_k,
               lambda token: print(decode(token[0]), end='', flush=True))
print()
