# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""A GPT that learns to add from examples, and then proves it: on every problem that there is.

    python addition_gpt.py                            learns, then answers all 1,000,000 problems
    python addition_gpt.py --resume=True --max_iters=0 --problem=123+456          only answers this
    python addition_gpt.py --chain_of_thought=True               writes out each column, then adds
    python addition_gpt.py --n_digits=10 --position=abacus --n_embd=96 --n_head=8 --max_iters=2500
                                                      learns up to 10 digits, adds 20

The defaults take 16 s to learn and 14 s to check (2-core x86 laptop-class CPU), and end with 0
wrong of 1,000,000 problems; so did four other seeds. The last of these commands learns for 81 s,
and then gets 99.8 % of the sums of numbers of 20 digits right.

What it has and gpt.py has not: problems made on the fly, a loss on the answers only, greedy
decoding, the check of all problems, a chain of thought, places that are counted from a number's
end. What gpt.py has and it has not: a text, a temperature, dropout, the ladder and its switches.
"""
import difflib, math, os, re, signal, sys, time, timeit
import torch, torch.nn as nn, torch.nn.functional as F

# ---------------------------------------------------------------- hyperparameters
gpus = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
device = 'cpu' if '--device=cpu' in sys.argv else next((d for d in gpus if gpus[d]), 'cpu')
dtype = 'auto'  # the type of number in matrix products: 'float32', 'bfloat16', 'float16', 'auto'
seed = 1337  # the same seed and settings give the same losses
n_digits = 3  # how many digits does a number have? Above 3: any length up to that
reverse = True  # is the sum written last digit first, as people add?
chain_of_thought = False  # are the columns written out first? The sum is then not reversed
position = 'learned'  # is a place counted from the start of the row, or the number's end: 'abacus'
test_digits = 20  # up to which length is the model tested, where n_digits is above 3?
batch_size = 128  # how many problems does one step learn from?
n_layer = 1  # how many blocks are stacked? One can add, if it may start with the last digit
n_head = 4  # in how many heads does each block look back?
n_embd = 48  # how many channels carry a token through the blocks?
mlp_width = 4  # how many times wider than that is the MLP inside?
max_iters = 1800  # how many steps of training?
learning_rate = 4e-3  # how far can a step go? Twice as far ends at a higher loss
warmup_iters = 100  # over how many steps does the learning rate rise to that?
weight_decay = 0.1  # how strongly are the matrices pulled towards zero?
beta2 = 0.99  # how long a memory does AdamW have for the size of gradients?
grad_clip = 1.0  # above which length is the gradient cut?
eval_interval = 500  # how many steps lie between two evaluations?
checkpoint = 'addition_gpt.pt'  # where are the weights kept, and all that a resumed run needs?
resume = False  # go on from that file?
problem = ''  # what is the model asked at the end? '123+456', say; '': all sorts, see below
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
for name in ('n_digits', 'batch_size', 'eval_interval'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
for name in ('n_layer', 'n_head', 'n_embd', 'mlp_width', 'warmup_iters', 'grad_clip'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
if n_embd % n_head: sys.exit(f'n_embd={n_embd} does not divide into n_head={n_head} equal heads')
for name, choices in (('position', ('learned', 'abacus')),
                      ('dtype', ('auto', 'float32', 'bfloat16', 'float16'))):
    if globals()[name] not in choices: sys.exit(f'{name}={globals()[name]}: not one of {choices}')
if chain_of_thought and position == 'abacus': sys.exit('chain_of_thought needs position=learned')
if not gpus.get(device, device == 'cpu'): sys.exit(f'device={device}: PyTorch finds {gpus} here')
backwards = reverse and not chain_of_thought  # does the sum start with its last digit?
lengths = range(1, n_digits + 1) if n_digits > 3 else [n_digits]  # of the numbers in a batch
longest = max(n_digits, test_digits) if n_digits > 3 else n_digits  # of those in a test
asked = re.fullmatch('([0-9]+)[+]([0-9]+)', problem)
if problem and not asked: sys.exit(f'problem={problem}: it must look like 123+456')
if len(max(asked.groups(), key=len) if asked else '') > longest:
    sys.exit(f'problem={problem}: these settings are for numbers of up to {longest} digits')

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
# 123+459= is answered 2850: read from its end that is 0582. A row of tokens, and what the model
# is to learn at each of them; -1 (all of the problem itself) is left out of the loss:
#     input    1  2  3  +  4  5  9  =  2  8  5
#     target  -1 -1 -1 -1 -1 -1 -1  2  8  5  0
# With a chain of thought the answer is 3+9+0=12,2+5+1=08,1+4+0=05,0582: for each column, from the
# last, its two digits and what was carried into it, and as their sum the next carry and a digit.
chars = '0123456789+=,'  # the vocabulary: the token id of a digit is that digit
vocab_size, stoi = len(chars), {c: i for i, c in enumerate(chars)}
encode = lambda s: [stoi[c] for c in s]  # string -> list of token ids
decode = lambda ids: ''.join(chars[i] for i in ids)  # list of token ids -> string

def add(a, b):
    """Digits (N, L) of two numbers -> those of the sum, and the carry into each: (N, L + 1)."""
    digits, carries = [], [torch.zeros_like(a[:, 0])]
    for i in reversed(range(a.shape[1])):  # column by column from the last, as at school
        column = a[:, i] + b[:, i] + carries[-1]
        digits.append(column % 10)
        carries.append(column // 10)
    digits.append(carries[-1])
    return torch.stack(digits[::-1], dim=1), torch.stack(carries[::-1], dim=1)

def write(problems):
    """Digits (N, 2, L) of problems -> rows of tokens (N, T): the problems and their answers."""
    a, b = problems.unbind(dim=1)
    total, carry = add(a, b)
    plus, equals, comma = (torch.full_like(a[:, :1], stoi[c]) for c in '+=,')
    row = [a, plus, b, equals]
    if chain_of_thought:
        for i in reversed(range(a.shape[1])):
            row += [a[:, i:i + 1], plus, b[:, i:i + 1], plus, carry[:, i + 1:i + 2], equals,
                    carry[:, i:i + 1], total[:, i + 1:i + 2], comma]
    row.append(total.flip(1) if backwards else total)
    return torch.cat(row, dim=1)

def held_out(problems):
    """Which of the problems (N, 2, L) are never trained on? One in a hundred, (N,).

    It is a**2 + b**2 that decides, so that with a+b its twin b+a is held out, too."""
    powers = [10**i % 101 for i in reversed(range(problems.shape[2]))]
    rest = (problems * torch.tensor(powers, device=device)).sum(dim=2)  # (N, 2), a and b modulo 101
    return (rest**2).sum(dim=1) % 101 == 1

def get_batch():
    """Rows of random problems x and what comes next y, both (B, T); as many of each length."""
    x, y = [], []
    for L in lengths:
        problems = torch.randint(10, (-(-batch_size // len(lengths)), 2, L)).to(device)
        row = write(problems)
        target = row[:, 1:].masked_fill(held_out(problems)[:, None], -1)
        target[:, :2 * L + 1] = -1  # the problem
        pad = (0, block_size + 1 - row.shape[1])  # shorter rows end in tokens that teach nothing
        x.append(F.pad(row[:, :-1], pad))
        y.append(F.pad(target, pad, value=-1))
    return torch.cat(x), torch.cat(y)

width = lambda L: write(torch.zeros(1, 2, L, dtype=torch.long)).shape[1]  # tokens of a row
block_size = width(n_digits) - 1  # how many tokens does a window have, in training?
if n_digits <= 3:  # all that there are, (1,000,000, 2, 3) for three digits
    all_problems = torch.cartesian_prod(*[torch.arange(10, device=device)] * 2 * n_digits)
    all_problems = all_problems.view(-1, 2, n_digits)

def sample(L):
    """Problems (N, 2, L) to test with: all that are held out; from 4 digits on some 500 of them."""
    chance = torch.Generator().manual_seed(0)  # its own, so that testing changes no training
    some = torch.randint(10, (50_000 if n_digits > 3 else 0, 2, L), generator=chance).to(device)
    problems = some if n_digits > 3 else all_problems
    return problems[held_out(problems)].unique(dim=0)

# ---------------------------------------------------------------- model
class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it what it needs (Vaswani et al. 2017)."""

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)  # q, k and v of all heads at once
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)  # mixes what the heads found
        # added to the scores: 0 on and below the diagonal, -inf above it, where the future lies
        mask = torch.full((width(longest), width(longest)), -math.inf).triu(diagonal=1)
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
        y = att.to(v.dtype) @ v  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)

class MLP(nn.Module):
    """What each position makes of it, on its own."""

    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, mlp_width * n_embd, bias=False)  # wide
        self.c_proj = nn.Linear(mlp_width * n_embd, n_embd, bias=False)  # and back

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        return self.c_proj(F.gelu(self.c_fc(x)))  # GELU: Hendrycks & Gimpel 2016

class Block(nn.Module):
    """Positions talk (attention), then think (MLP)."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), CausalSelfAttention()  # each has its norm
        self.ln_2, self.mlp = nn.LayerNorm(n_embd), MLP()

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class Abacus(nn.Module):
    """Tells each token its place as counted from its number's end (McLeish et al. 2024).

    In training all places of a row are moved by the same random number, so that high ones are
    learned from short numbers, too. They lie on a circle, and are told by its first five waves
    instead of a table: what is learned about one distance then holds for those near it, too."""

    def __init__(self):
        super().__init__()
        self.size = longest + 2  # places on the circle: an answer's digits, and one for '='
        angle = torch.arange(self.size).view(-1, 1) * torch.arange(1, 6) * 2 * math.pi / self.size
        self.register_buffer('waves', torch.cat((angle.sin(), angle.cos()), 1), persistent=False)
        self.weight = nn.Parameter(torch.empty(n_embd, 10))

    def forward(self, idx):
        """Token ids (B, T) -> (B, T, n_embd)"""
        t = torch.arange(idx.shape[1], device=device)  # (T,)
        L = (idx == stoi['+']).long().argmax(dim=1, keepdim=True)  # (B, 1): digits before the '+'
        # 12+34=64 has places 21321012: each token of '=64' has to look for the next place, and
        # beyond the highest digits it finds '+' there, so that it knows that there are no more
        place = torch.where(t < L, L - t, 2 * L + 1 - t)  # (B, T)
        place = torch.where(t <= 2 * L + 1, place, t - 2 * L - 1 if reverse else 3 * L + 3 - t)
        if self.training: place = place + torch.randint(self.size, (len(idx), 1)).to(device)
        return F.linear(self.waves[place % self.size], self.weight)

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)  # which token it is
        self.wpe = nn.Embedding(width(longest), n_embd) if position == 'learned' else Abacus()
        self.h = nn.Sequential(*[Block() for _ in range(n_layer)])  # the hidden layers
        self.ln_f = nn.LayerNorm(n_embd)  # the final norm
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)  # channels -> logits
        self.lm_head.weight = self.wte.weight  # one table reads and writes (Press & Wolf 2017)
        # a layer whose output is added to the residual stream starts the smaller, the more of them
        # there are (Radford et al. 2019)
        for name, p in self.named_parameters():
            if name.startswith('h') and p.dim() == 2:
                gain = 0.8 / (2 * n_layer)**0.5 if 'c_proj' in name else 0.8
                nn.init.normal_(p, std=gain * p.shape[1]**-0.5)
        nn.init.normal_(self.wte.weight, std=0.05)
        nn.init.normal_(self.wpe.weight, std=0.05)

    @autocast  # matrix products in dtype; softmax, LayerNorm and loss in float32
    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss."""
        where = idx if position == 'abacus' else torch.arange(idx.shape[1], device=device)
        logits = self.lm_head(self.ln_f(self.h(self.wte(idx) + self.wpe(where)))).float()
        if targets is None: return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Problems (B, T) -> with answers (B, T + max_new_tokens), always the likeliest token."""
        for _ in range(max_new_tokens):
            logits = self(idx)[0][:, -1]  # (B, vocab_size)
            idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
        return idx

# ---------------------------------------------------------------- training
@torch.no_grad()
def check(problems):
    """Which problems (N, 2, L) are answered rightly (N,), and the loss of each answer token.

    One pass is enough for greedy decoding: it is right just where every token of the answer is
    the likeliest one, given the right ones before it. A chain of thought counts as answer."""
    row, start = write(problems), 2 * problems.shape[2] + 1
    logits, y = model(row[:, :-1])[0][:, start:], row[:, start + 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction='none')
    return (logits.argmax(dim=-1) == y).all(dim=1), loss

def evaluate():
    """Mean loss on problems never trained on, nats per answer token; nothing random."""
    model.eval()
    right, loss = zip(*[check(part) for p in val_problems for part in p.split(2000)])
    model.train()
    solved.append(torch.cat(right).float().mean().item())
    return torch.cat(loss).mean().item()

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
val_problems = [sample(L) for L in lengths]
print(f'a row: {decode(write(val_problems[-1][-1:])[0])}' + ' (the sum reversed)' * backwards
      + f'; {sum(map(len, val_problems)):,} problems held out; '
      f'{sum(p.numel() for p in model.parameters()):,} parameters')
matrices = [p for p in model.parameters() if p.dim() == 2]
vectors = [p for p in model.parameters() if p.dim() == 1]  # LayerNorm's: no pull towards zero
# when all is learned gradients are next to nothing, and Adam takes full steps along their noise;
# with a larger eps it does not, and what holds for longer numbers is not lost again
optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                               {'params': vectors, 'weight_decay': 0.0}],
                              eps=1e-8 if position == 'learned' else 1e-5,
                              betas=(0.9, beta2), fused=True)
scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')
step, losses, val_losses, seconds, best = 0, [], [], 0.0, model.state_dict()
solved = []  # the share of the problems held out that is answered rightly, at each evaluation
must_fit = {'script': 'addition_gpt.py', 'n_digits': n_digits, 'longest': longest,
            'reverse': reverse, 'chain_of_thought': chain_of_thought, 'position': position,
            'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd, 'mlp_width': mlp_width}
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
        print(f'{"":10} {solved[-1]:.2%} of the problems held out answered rightly', flush=True)
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

def ask(problems):
    """Have problems (N, 2, L) answered token by token, and print what comes."""
    L, rows = problems.shape[2], write(problems)
    answers = model.generate(rows[:, :2 * L + 2], rows.shape[1] - 2 * L - 2)
    for numbers, row, answer in zip(problems, rows, answers):
        a, b = (int(decode(number)) for number in numbers)
        said = decode(answer[-L - 1:])
        if backwards: said = said[::-1]
        verdict = 'right' if said == f'{a + b:0{L + 1}}' else f'wrong, it is {a + b}'
        print(f'{a}+{b}={said.lstrip("0") or "0"}  ({verdict})')
        if chain_of_thought:  # column by column
            for column in range(2 * L + 2, len(row) - L - 1, 9):
                said, true = (decode(tokens[column:column + 8]) for tokens in (answer, row))
                print(f'    {said}  ({"right" if said == true else f"wrong, it is {true}"})')

print('-' * 64)
if asked:
    L = n_digits if n_digits <= 3 else max(map(len, asked.groups()))
    ask(torch.tensor([[encode(number.zfill(L)) for number in asked.groups()]], device=device))
else:  # up to three digits the proof, on all problems; beyond, a sample of each length
    new, mistakes, start = [], [], time.time()
    for problems in [all_problems] if n_digits <= 3 else map(sample, range(1, longest + 1)):
        right, L = torch.zeros(0, dtype=torch.bool, device=device), problems.shape[2]
        for part in problems.split(2000):
            right = torch.cat((right, check(part)[0]))
            if clear: print(f'{clear}{len(right):,} of {len(problems):,}', end='', flush=True)
        print(f'{clear}{L} digits: {(~right).sum():,} wrong of {len(problems):,}'
              + ('' if n_digits <= 3 else f', {right.float().mean():.2%} right')
              + ('' if L in lengths else ', a length never trained on'))
        carries, unseen = add(*problems.unbind(dim=1))[1].sum(dim=1), held_out(problems)
        new.append(torch.stack((carries, right), dim=1)[unseen])
        mistakes += problems[~right][:5]
    print(f'{time.time() - start:.1f} s; of those never trained on, by how many columns carry:')
    carries, right = torch.cat(new).unbind(dim=1)
    for count in carries.unique():
        some = right[carries == count]
        print(f'{count:4}: {(some == 0).sum():,} wrong of {len(some):,}')
    if mistakes: print('its first mistakes:')
    for some in mistakes[:5]: ask(some[None])
    print('examples:')
    ask(val_problems[-1][::-(-len(val_problems[-1]) // 3)])  # three of them
