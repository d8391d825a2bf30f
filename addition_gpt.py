# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy"]  # torch warns without numpy
# ///
"""A GPT that learns addition from examples, and a proof that it can add any two numbers.

    python addition_gpt.py                                  train, then check 1,000,000 sums
    python addition_gpt.py --n_digits=10 --test_digits=60   train on 10 digits, test to 60
    python addition_gpt.py --resume --max_iters=0 --problem=123+456   just answer this
    python addition_gpt.py --position=learned --max_iters=2000 --learning_rate=8e-3
                                                            positions as in gpt.py

On 2 cores of an AMD EPYC it trains for 2.5 s on 102,400 random problems, then gets all
1,000,000 sums of two numbers up to 999 right (4.3 s), with each of 15 seeds. The script
fixes the order of the digits and which digits see each other; the model learns what to do
with the digits.

New since gpt.py: problems made on the fly, a loss on the answers only, positions by column,
greedy decoding, the proof. Not here: a text, mixed precision, dropout, weight decay, top-k
sampling, the ladder.
"""
import math, os, re, signal, sys, time
import torch
import torch.nn as nn
from torch.nn import functional as F

# ------------------------------------------------------------------ hyperparameters
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # on a Mac 'mps' works, too
seed = 1337  # same seed + same settings = same model
n_digits = 3  # train on numbers of up to this many digits (7 is 007)
test_digits = 20  # test on numbers of up to this many digits
reverse = True  # write the sum last digit first, as on paper
position = 'coupled'  # digits of a column share a position; 'learned': as in gpt.py
batch_size = 128  # problems per step
block_size = 128  # longest input in tokens (learned positions only)
n_layer = 1  # blocks; one is enough if the sum is written last digit first
n_head = 2  # attention heads per block
n_embd = 16  # width of the residual stream
mlp_width = 4  # hidden layer of the MLP, as a multiple of n_embd
layer_norm = True  # LayerNorm before attention, MLP and head
init_gain = 0.8  # initial weights have standard deviation init_gain / sqrt(inputs)
c_proj_gain = 0.3  # likewise for c_proj layers, which write to the residual stream
max_iters = 800  # training steps
learning_rate = 2e-2  # peak learning rate
warmup_iters = 100  # warm-up steps
beta2 = 0.9  # Adam averages squared gradients over 1 / (1 - beta2) steps
grad_clip = 1.0  # clip the gradient norm at this value
eval_interval = 200  # evaluate every this many steps
checkpoint = 'addition_gpt.pt'  # checkpoint file, written at every evaluation
resume = False  # continue from the checkpoint, with its sizes
problem = ''  # a problem to answer, such as 123+456 ('': all checks)

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
# 123+459=582 becomes the row 123+459=2850: the sum starts with its last digit and ends with
# the last carry. Only the answer is scored; all other targets are -1:
#     input    1  2  3  +  4  5  9  =  2  8  5
#     target  -1 -1 -1 -1 -1 -1 -1  2  8  5  0
chars = '0123456789+='  # the vocabulary; a digit's token id is the digit itself
vocab_size = len(chars)
stoi = {c: i for i, c in enumerate(chars)}  # character -> token id
encode = lambda s: [stoi[c] for c in s]  # string -> list of token ids
decode = lambda ids: ''.join(chars[i] for i in ids)  # list of token ids -> string

def write(problems):
    """Digits (N, 2, L) of problems -> rows of tokens (N, 3 * L + 3): problems and answers."""
    a, b = problems.unbind(dim=1)  # (N, L)
    carry = torch.zeros_like(a[:, 0])
    answer = []
    for i in reversed(range(a.shape[1])):  # column by column, as at school
        total = a[:, i] + b[:, i] + carry
        answer.append(total % 10)
        carry = total // 10
    answer.append(carry)
    if not reverse:
        answer.reverse()
    plus = torch.full_like(a[:, :1], stoi['+'])
    equals = torch.full_like(a[:, :1], stoi['='])
    return torch.cat((a, plus, b, equals, torch.stack(answer, dim=1)), dim=1)

def columns(L):
    """The column of each token, 1 for the ones, 2 for the tens: (3 * L + 3,).

        token   1 2 3 + 4 5 9 = 2 8 5 0
        column  3 2 1 4 3 2 1 0 1 2 3 4

    The digits of a column share a position (position coupling, Cho et al. 2024) that has
    no embedding: a token sees its own column and the next higher one, not which they are.
    The answer's 2 sees its own column (3, 9, 2: 3 + 9 = 12, carry 1) and the next (2 and
    5), so 8 comes next. The last carry is in the column of '+'."""
    number = list(range(L, 0, -1))
    answer = list(range(1, L + 2))
    return torch.tensor(number + [L + 1] + number + [0] + answer, device=device)

def held_out(problems):
    """True for the problems (N, 2, L) never trained on, about one in a hundred: (N,).

    a**2 + b**2 modulo 101 decides, so a+b and b+a are held out together."""
    residues = torch.zeros_like(problems[:, :, 0])  # (N, 2): a and b modulo 101
    for digit in problems.unbind(dim=2):
        residues = (10 * residues + digit) % 101
    return (residues ** 2).sum(dim=1) % 101 == 1

def held_out_problems(L, n):
    """About n held-out problems, the same in every run: (N, 2, L)."""
    rng = torch.Generator().manual_seed(L)
    problems = torch.randint(10, (100 * n, 2, L), generator=rng).to(device)
    return problems[held_out(problems)]

def get_batch():
    """Rows of random problems x and the next tokens y, -1 before the answer. Both (B, T)."""
    problems = torch.randint(10, (batch_size, 2, n_digits)).to(device)
    problems[held_out(problems)] = 0  # replace held-out problems by 0+0
    rows = write(problems)
    y = rows[:, 1:].clone()
    y[:, :2 * n_digits + 1] = -1
    return rows[:, :-1], y

# ------------------------------------------------------------------ model
# The names are GPT-2's: wte and wpe are the embeddings of tokens and positions, h the blocks,
# ln a LayerNorm, c_attn, c_fc and c_proj linear layers.
class CausalSelfAttention(nn.Module):
    """Each position gathers what it needs from itself and the positions before it.

    With coupled positions, a token sees only its own column and the next (see columns)."""

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)  # q, k and v of all heads
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)  # mixes the heads
        if position == 'coupled':
            # (n_head, 2): at first head 0 favors the same column, head 1 the next
            self.bias = nn.Parameter(3 * torch.eye(n_head, 2))

    def forward(self, x, column):
        B, T, C = x.shape
        head_size = C // n_head
        # query: what am I looking for? key: what do I contain? value: what do I pass on?
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, n_head, head_size).transpose(1, 2)
        v = v.view(B, T, n_head, head_size).transpose(1, 2)
        # the root keeps the spread of the scores the same for every head size
        att = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, T)
        # added to the scores: 0 for the past and present, -inf for the future
        mask = torch.full((T, T), -math.inf, device=x.device).triu(diagonal=1)
        if position == 'coupled':
            # (T, T): 0 in a token's own column, 1 in the next, -1 or 2 in all others
            distance = (column - column[:, None]).clamp(-1, 2)
            # (n_head, 4): what to add at distance -1, 0, 1, 2
            bias = F.pad(self.bias, (1, 1), value=-math.inf)
            mask = mask + bias[:, distance + 1]  # (n_head, T, T)
        att = att + mask
        att = F.softmax(att, dim=-1)  # each row sums to 1
        y = att @ v  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)

class MLP(nn.Module):
    """Each position processes, on its own, what it has gathered."""

    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, mlp_width * n_embd, bias=False)
        self.c_proj = nn.Linear(mlp_width * n_embd, n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))

class Block(nn.Module):
    """Communicate, then compute. Both add to x, the residual stream."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd) if layer_norm else nn.Identity()
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(n_embd) if layer_norm else nn.Identity()
        self.mlp = MLP()

    def forward(self, x, column):
        x = x + self.attn(self.ln_1(x), column)
        x = x + self.mlp(self.ln_2(x))
        return x

class GPT(nn.Module):
    """Embeddings, a stack of blocks, and a head that scores every possible next token."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)  # which token it is
        if position == 'learned':  # coupled positions act in attention
            self.wpe = nn.Embedding(block_size, n_embd)  # where it stands
        self.h = nn.ModuleList([Block() for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd) if layer_norm else nn.Identity()
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # shared weights (Press & Wolf 2017)
        for name, p in self.named_parameters():
            if p.dim() == 2 and 'bias' not in name:  # attn.bias is set already
                gain = c_proj_gain if 'c_proj' in name else init_gain
                nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)  # embeddings, too

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss.

        All numbers of a batch have L digits; targets of -1 are not scored."""
        T = idx.shape[1]
        x = self.wte(idx)  # (B, T, n_embd)
        if position == 'learned':
            x = x + self.wpe.weight[:T]
        L = idx[0].tolist().index(stoi['+'])  # '+' follows the first number
        column = columns(L)[:T]
        for block in self.h:
            x = block(x, column)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Continue idx (B, T) with the most likely tokens: (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx)
            token = logits[:, -1:].argmax(dim=-1)  # (B, 1)
            idx = torch.cat((idx, token), dim=1)
        return idx

# ------------------------------------------------------------------ training
if resume:
    saved = torch.load(checkpoint, map_location=device, weights_only=True)
    globals().update(saved['sizes'])
    override()  # typed sizes must match: see the next assert
sizes = dict(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
             mlp_width=mlp_width, layer_norm=layer_norm, n_digits=n_digits, reverse=reverse,
             position=position)
if resume:
    assert sizes == saved['sizes'], f'{checkpoint} was trained with {saved["sizes"]}'
assert n_embd % n_head == 0, f'n_embd ({n_embd}) must be a multiple of n_head ({n_head})'
assert abs(seed) < 10**12, 'seed: at most 12 digits'  # seed * 10**6 must fit in 64 bits
assert position in ('coupled', 'learned'), "position: 'coupled' or 'learned'?"
assert reverse or position == 'learned', 'reverse=False needs position=learned'
assert not problem or re.fullmatch('[0-9]+[+][0-9]+', problem), 'problem: two numbers (123+456)'
numbers = problem.split('+') if problem else []
longest = max(n_digits, test_digits, *map(len, numbers))
if position == 'learned':
    needed = 3 * longest + 2
    assert needed <= block_size, f'numbers of {longest} digits need block_size={needed}'

torch.manual_seed(seed)
model = GPT().to(device)
print(f'{device}; {sum(p.numel() for p in model.parameters()):,} parameters')
# no weight decay: random problems seldom repeat, so there is little to overfit
optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, beta2), fused=True)

@torch.no_grad()
def check(problems):
    """Which problems (N, 2, L) are answered correctly, (N,), and each answer token's loss.

    One pass is enough: greedy decoding gets an answer right exactly when each token is the
    most likely one after the correct tokens before it."""
    rows = write(problems)
    start = 2 * problems.shape[2] + 1  # the position of '='
    logits, _ = model(rows[:, :-1])
    logits = logits[:, start:]  # what follows '=' and each token of the answer
    answer = rows[:, start + 1:]
    correct = (logits.argmax(dim=-1) == answer).all(dim=1)
    losses = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction='none')
    return correct, losses

val_problems = held_out_problems(n_digits, 30_000 // n_digits)  # few if long, to save time

def evaluate():
    """Mean loss on the held-out problems, in nats per token, and the fraction correct."""
    correct, losses = check(val_problems)
    return losses.mean().item(), correct.float().mean().item()

step = 0
train_loss = 0.0  # running mean of about the last 100 steps
best_loss = math.inf  # lowest validation loss
best = {}  # the weights that reached it
if resume:
    model.load_state_dict(saved['model'])
    # use this run's betas, not the saved ones
    saved['optimizer']['param_groups'] = optimizer.state_dict()['param_groups']
    optimizer.load_state_dict(saved['optimizer'])
    step = saved['step']
    train_loss = saved['train_loss']
    best_loss = saved['best_loss']
    best = saved['best']
    print(f'loaded {checkpoint}, saved after step {step}, with {sizes}')

temporary = f'{checkpoint}.{os.getpid()}.tmp'  # unique to this process
if step < max_iters:
    open(temporary, 'wb').close()  # if files cannot be written, fail now, not in an hour
    os.remove(temporary)
    if os.path.isfile(checkpoint) and not resume:
        os.replace(checkpoint, checkpoint + '.old')
        print(f'renamed the earlier {checkpoint} to {checkpoint}.old')

stop = []  # Ctrl-C appends to it
def interrupt(*_):
    """First Ctrl-C: end training after the current step. Second: stop at once."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop.append(True)

signal.signal(signal.SIGINT, interrupt)

def report(line):
    """Print a line; if that fails (its reader has quit), save and stop."""
    try:
        print(line)
    except OSError:
        stop.append(True)

def save():
    """Write a temporary file, then rename it: a killed run never leaves half a checkpoint."""
    state = dict(sizes=sizes, optimizer=optimizer.state_dict(), model=model.state_dict(),
                 best=best, step=step, train_loss=train_loss, best_loss=best_loss)
    try:
        with open(temporary, 'wb') as file:
            torch.save(state, file)
        os.replace(temporary, checkpoint)
    except (OSError, RuntimeError) as error:  # a full disk, for example
        report(f'could not write {checkpoint}: {error}')
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

start_time = time.time()
for step in range(step + 1, max_iters + 1):
    torch.manual_seed(seed * 10**6 + step)  # a resumed run draws the same
    lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # falls to zero
    lr = lr * min(step / (warmup_iters + 1), 1)
    for group in optimizer.param_groups:
        group['lr'] = lr
    x, y = get_batch()
    logits, loss = model(x, y)
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()

    train_loss += (loss.item() - train_loss) / min(step, 100)
    assert math.isfinite(train_loss), f'the loss is {loss}; lower the learning rate'
    if step % max(1, max_iters // 20) == 0:  # 60 stars: as bad as guessing
        stars = '*' * int(60 * min(1, train_loss / math.log(max(2, vocab_size))))
        report(f'{step:6} {stars}')
    if step % eval_interval == 0 or step == max_iters:
        val_loss, accuracy = evaluate()
        assert math.isfinite(val_loss), f'the loss is {val_loss}; lower the learning rate'
        if val_loss < best_loss:
            best_loss = val_loss
            best = {name: p.clone() for name, p in model.state_dict().items()}
        save()
        report(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
               f'{time.time() - start_time:.1f} s')
        report(f'       {accuracy:.2%} of the held-out problems correct')
    if stop:
        save()
        report(f'stopped after step {step}')
        break
signal.signal(signal.SIGINT, signal.default_int_handler)

# ------------------------------------------------------------------ sampling
if best:
    model.load_state_dict(best)
    print(f'best val loss {best_loss:.4f}, perplexity {math.exp(best_loss):.2f}')
print('-' * 64)

def ask(digits):
    """Let the model answer one problem (2, L), token by token, and print the result."""
    L = digits.shape[1]
    row = write(digits[None])[:, :2 * L + 2]  # through the '='
    answer = decode(model.generate(row, L + 1)[0, 2 * L + 2:])
    if reverse:
        answer = answer[::-1]
    a, b = (int(decode(number)) for number in digits)
    verdict = 'correct' if answer == str(a + b).zfill(L + 1) else f'wrong: it is {a + b}'
    print(f'{a}+{b}={answer.lstrip("0") or "0"} ({verdict})')

def mistakes(problems):
    """The problems among these (N, 2, L) that the model gets wrong."""
    wrong = []
    for part in problems.split(2000):  # all at once would take too much memory
        correct, _ = check(part)
        wrong.append(part[~correct])
    return torch.cat(wrong)

def carry_all_along(problems):
    """Change problems (N, 2, L) so that every column carries, as in 1239+8764."""
    a = problems[:, 0].clone()
    a[:, -1] = 9
    b = 9 - a  # a column that adds up to nine passes the carry on
    b[:, -1] = problems[:, 1, -1].clamp(min=1)  # the ones column starts the carry
    return torch.stack((a, b), dim=1)

if problem:
    L = max(n_digits, *map(len, numbers))
    ask(torch.tensor([encode(number.zfill(L)) for number in numbers], device=device))
else:
    if n_digits <= 3 or position == 'coupled':
        # The proof. With coupled positions and one block, the model writes each digit
        # from the two columns that the token before it sees. Three-digit sums contain every
        # such case, with and without an incoming carry. So if none is wrong, sums of any
        # length are right (up to float rounding). With learned positions, more blocks or
        # fewer digits this is a check, not a proof.
        start_time = time.time()
        L = min(3, n_digits)
        digits = [torch.arange(10, device=device)] * (2 * L)
        problems = torch.cartesian_prod(*digits).view(-1, 2, L)  # all of them
        wrong = mistakes(problems)
        print(f'all problems of {L} digits: {len(wrong):,} wrong of {len(problems):,}, '
              f'{time.time() - start_time:.1f} s')
        for digits in wrong[:3]:
            ask(digits)
    print('held-out problems, and problems in which every column carries:')
    for L in range(n_digits, longest + 1):
        problems = held_out_problems(L, 500)
        hard = carry_all_along(problems)
        print(f'{L:3} digits: {len(mistakes(problems))} wrong of {len(problems)}, '
              f'{len(mistakes(hard))} of {len(hard)}')
    ask(problems[0])  # an example of each
    ask(hard[0])
