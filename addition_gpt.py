# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy"]  # torch warns without numpy
# ///
r"""A GPT that learns addition from examples, and a proof that it can add any two numbers.

    python addition_gpt.py                                  train, then check 1,000,000 sums
    python addition_gpt.py --problem=123+456                train, then answer this
    python addition_gpt.py --n_digits=10 --test_digits=60   train on 10 digits, test to 60
    python addition_gpt.py --order=scratchpad --position=learned --n_embd=48 --n_head=4 \
        --max_iters=3000 --learning_rate=4e-3               with a chain of thought

On 2 cores of an AMD EPYC it trains for 2 s on 102,400 random problems, then gets all
1,000,000 sums of two numbers up to 999 right (5 s), with each of 5 seeds. The script fixes
the order of the digits and which digits see each other; the model learns what to do with the
digits.

New since gpt.py: problems made on the fly, a loss on the answers only, positions by column,
a scratchpad, the proof. Not here: a text, checkpoints, mixed precision, dropout, weight decay,
top-k sampling, the ladder.
"""
import math, os, re, sys, time
import torch
import torch.nn as nn
from torch.nn import functional as F

# ------------------------------------------------------------------ hyperparameters
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # on a Mac 'mps' works, too
seed = 1337  # same seed + same settings = same model
n_digits = 3  # train on numbers of up to this many digits (7 is 007)
test_digits = 20  # test on numbers of up to this many digits
order = 'reversed'  # last digit of the sum first, as on paper; 'plain' or 'scratchpad'
position = 'coupled'  # digits of a column share a position; 'learned': as in gpt.py
batch_size = 128  # problems per step
block_size = 128  # longest input in tokens (learned positions only)
n_layer = 1  # blocks; one is enough if the sum is written last digit first
n_head = 2  # attention heads per block
n_embd = 16  # width of the residual stream
mlp_width = 4  # hidden layer of the MLP, as a multiple of n_embd
init_gain = 0.8  # initial matrices have standard deviation init_gain / sqrt(columns)
c_proj_gain = 0.3  # likewise for c_proj layers, which write to the residual stream
max_iters = 800  # training steps
learning_rate = 2e-2  # peak learning rate
warmup_ratio = 0.12  # fraction of the steps over which the learning rate rises
beta2 = 0.9  # Adam averages squared gradients over 1 / (1 - beta2) steps
grad_clip = 1.0  # clip the gradient norm at this value (0 = do not)
eval_interval = 200  # evaluate every this many steps
problem = ''  # a problem to answer, such as 123+456 ('': check all)

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
# problems (N, 2, L): N pairs of numbers, each as L digits.
# 123+459=582 becomes a row of tokens, in one of three orders:
#     reversed    123+459=2850        last digit first, so that carries come before their use
#     plain       123+459=0582        the first digit depends on every carry
#     scratchpad  123+459=2850=0582   reversed, then plain: a chain of thought (Nye et al.
#                                     2021, Wei et al. 2022)
# Only what follows the first '=' enters the loss; all other targets are -1:
#     x    1  2  3  +  4  5  9  =  2  8  5
#     y   -1 -1 -1 -1 -1 -1 -1  2  8  5  0
chars = '0123456789+='  # the vocabulary; a digit's token id is the digit itself
vocab_size = len(chars)
stoi = {c: i for i, c in enumerate(chars)}  # character -> token id
encode = lambda s: [stoi[c] for c in s]  # string -> list of token ids
decode = lambda ids: ''.join(chars[i] for i in ids)  # list of token ids -> string

def rows_of(problems):
    """Digits (N, 2, L) of problems -> rows of tokens (N, T), problems and answers."""
    a, b = problems.unbind(dim=1)  # (N, L)
    plus = torch.full_like(a[:, :1], stoi['+'])
    equals = torch.full_like(a[:, :1], stoi['='])
    carry = torch.zeros_like(a[:, 0])
    digits = []
    for i in reversed(range(a.shape[1])):  # column by column, as at school
        total = a[:, i] + b[:, i] + carry
        digits.append(total % 10)
        carry = total // 10
    last_first = torch.stack(digits + [carry], dim=1)  # (N, L + 1)
    plain = last_first.flip(1)
    answers = {'reversed': [last_first], 'plain': [plain],
               'scratchpad': [last_first, equals, plain]}
    return torch.cat([a, plus, b, equals] + answers[order], dim=1)

def inputs_and_targets(problems):
    """Rows of problems (N, 2, L) as inputs x and next tokens y, -1 before the answer: (N, T)."""
    rows = rows_of(problems)
    y = rows[:, 1:].clone()
    y[:, :2 * problems.shape[2] + 1] = -1
    return rows[:, :-1], y

def columns(L):
    """The column of each token, 1 for the ones, 2 for the tens: (3 * L + 3,).

        token   1 2 3 + 4 5 9 = 2 8 5 0
        column  3 2 1 4 3 2 1 0 1 2 3 4

    All digits of a column share one position (position coupling, Cho et al. 2024). It is not
    embedded: a token sees only its own column and the next higher one, and can tell these two
    apart. The answer's 8 sees 2, 5 and 8: 2 + 5 is 7, so 1 was carried in, and 8 carries
    nothing on. It also sees 1 and 4, so 5 comes next. '+' has the column of the last carry."""
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
    """Random problems, as inputs x and targets y: (batch_size, T)."""
    problems = torch.randint(10, (batch_size, 2, n_digits)).to(device)
    problems[held_out(problems)] = 0  # replace held-out problems by 0+0
    return inputs_and_targets(problems)

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
            # (n_head, 2): at first head 0 favors the same column, head 1 the next (by e**3 = 20)
            self.bias = nn.Parameter(3 * torch.eye(n_head, 2))

    def column_bias(self, column):
        """What is added to a score, by the column of the key: (n_head, T, T).

            a lower column    -inf
            the same column   bias[:, 0]
            the next higher   bias[:, 1]
            any higher one    -inf"""
        distance = (column - column[:, None]).clamp(-1, 2)  # (T, T): -1, 0, 1 or 2
        bias = F.pad(self.bias, (1, 1), value=-math.inf)  # (n_head, 4): one for each distance
        return bias[:, distance + 1]

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
        att = att + torch.full((T, T), -math.inf, device=x.device).triu(diagonal=1)
        if position == 'coupled':
            att = att + self.column_bias(column)
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
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(n_embd)
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
            self.wpe = nn.Embedding(block_size, n_embd)  # its position
        self.h = nn.ModuleList([Block() for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # shared weights (Press & Wolf 2017)
        for name, p in self.named_parameters():
            if p.dim() == 2 and 'bias' not in name:  # attn.bias is set already
                gain = c_proj_gain if 'c_proj' in name else init_gain
                nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)

    def forward(self, idx, L, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss.

        All numbers have L digits; targets of -1 are ignored."""
        T = idx.shape[1]
        x = self.wte(idx)  # (B, T, n_embd)
        if position == 'learned':
            x = x + self.wpe.weight[:T]
        column = columns(L)[:T]
        for block in self.h:
            x = block(x, column)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, L, max_new_tokens):
        """Continue idx (B, T) with the most likely tokens: (B, T + max_new_tokens).

        Answers are short, so they are returned whole, with the problem before them."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx, L)
            token = logits[:, -1:].argmax(dim=-1)  # (B, 1)
            idx = torch.cat((idx, token), dim=1)
        return idx

# ------------------------------------------------------------------ training
assert n_embd % n_head == 0, f'n_embd ({n_embd}) must be a multiple of n_head ({n_head})'
assert position in ('coupled', 'learned'), "position: 'coupled' or 'learned'?"
assert order in ('reversed', 'plain', 'scratchpad'), 'order: reversed, plain or scratchpad?'
assert order == 'reversed' or position == 'learned', (
    f'--order={order} needs --position=learned --n_embd=48 --n_head=4 --max_iters=3000 '
    '--learning_rate=4e-3')
assert not problem or re.fullmatch('[0-9]{1,300}[+][0-9]{1,300}', problem), (
    'problem: two numbers of at most 300 digits (123+456)')
numbers = problem.split('+') if problem else []
longest = max(n_digits, *map(len, numbers)) if problem else max(n_digits, test_digits)
needed = 4 * longest + 4 if order == 'scratchpad' else 3 * longest + 2
assert position == 'coupled' or needed <= block_size, (
    f'numbers of {longest} digits need block_size={needed}')

torch.manual_seed(seed)
model = GPT().to(device)
print(f'{device}; {sum(p.numel() for p in model.parameters()):,} parameters')
# no weight decay: random problems seldom repeat, so there is little to overfit
optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, beta2), fused=True)

@torch.no_grad()
def evaluate(model, problems):
    """Problems (N, 2, L) -> mean loss in nats per token, and those answered wrong (M, 2, L)."""
    L = problems.shape[2]
    total, wrong = 0.0, []
    for part in problems.split(2000):  # all at once would take too much memory
        x, y = inputs_and_targets(part)
        logits, loss = model(x, L, y)
        total += loss.item() * len(part)
        # if each token of the answer is the most likely one after the correct tokens before it,
        # generate would write it; write out the others: a wrong scratchpad can still end right
        exact = ((logits.argmax(dim=-1) == y) | (y == -1)).all(dim=1)
        x, y, part = x[~exact], y[~exact], part[~exact]
        written = model.generate(x[:, :2 * L + 2], L, y.shape[1] - 2 * L - 1)
        right = (written[:, -L - 1:] == y[:, -L - 1:]).all(dim=1)
        wrong.append(part[~right])
    return total / len(problems), torch.cat(wrong)

val_problems = held_out_problems(n_digits, 30_000 // n_digits)  # few if long, to save time
train_loss = 0.0  # running mean of about the last 100 steps
start_time = time.time()
for step in range(1, max_iters + 1):
    lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # falls to zero
    lr = lr * min(step / (warmup_ratio * max_iters + 1), 1)  # rises from near zero
    for group in optimizer.param_groups:
        group['lr'] = lr
    # forward
    x, y = get_batch()
    logits, loss = model(x, n_digits, y)
    # backward, and a step against the gradient
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    optimizer.step()

    assert loss < 100, f'the loss is {loss}; lower the learning rate'  # false for nan, too
    train_loss += (loss.item() - train_loss) / min(step, 100)
    if step % max(1, max_iters // 20) == 0:
        print(f'{step:6} {"*" * int(15 * train_loss)}')  # 15 stars for each nat
    if step % eval_interval == 0 or step == max_iters:
        val_loss, wrong = evaluate(model, val_problems)
        print(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
              f'{time.time() - start_time:.1f} s')
        print(f'       {1 - len(wrong) / len(val_problems):.2%} of the held-out problems correct')

# ------------------------------------------------------------------ sampling
print('-' * 64)

def ask(digits):
    """Let the model answer one problem (2, L), token by token, and print the result."""
    L = digits.shape[1]
    row = rows_of(digits[None])
    written = model.generate(row[:, :2 * L + 2], L, row.shape[1] - 2 * L - 2)[0]
    answer = decode(written[-L - 1:])
    if order == 'reversed':
        answer = answer[::-1]
    a, b = (int(decode(number)) for number in digits)
    verdict = 'correct' if answer == str(a + b).zfill(L + 1) else f'wrong: it is {a + b}'
    text = decode(written) if order == 'scratchpad' else f'{a}+{b}={answer.lstrip("0") or "0"}'
    print(f'{text} ({verdict})')

def carry_all_along(problems):
    """Change problems (N, 2, L) so that every column carries, as in 1239+8764."""
    a = problems[:, 0].clone()
    a[:, -1] = 9
    b = 9 - a  # a column that adds up to nine passes the carry on
    b[:, -1] = problems[:, 1, -1].clamp(min=1)  # the ones column starts the carry
    return torch.stack((a, b), dim=1)

def prove():
    """Check all problems of three digits.

    With coupled positions and one block, each digit depends only on the token before it and
    the digits in that token's column and the next. Three digits contain every case: the ones
    (no carry in), a middle column and the last one (with and without). If none is wrong, each
    digit after correct ones is right, and so are sums of any length (up to float rounding).
    With learned positions, more blocks or fewer digits this is only a check."""
    start_time = time.time()
    L = min(3, n_digits)
    digits = [torch.arange(10, device=device)] * (2 * L)
    problems = torch.cartesian_prod(*digits).view(-1, 2, L)  # all of them
    _, wrong = evaluate(model, problems)
    print(f'all problems of {L} digits: {len(wrong):,} wrong of {len(problems):,}, '
          f'{time.time() - start_time:.1f} s')
    for digits in wrong[:3]:
        ask(digits)

if problem:
    ask(torch.tensor([encode(number.zfill(longest)) for number in numbers], device=device))
else:
    if n_digits <= 3 or position == 'coupled':
        prove()
    print('held-out problems, and problems in which every column carries:')
    for L in range(n_digits, longest + 1):
        problems = held_out_problems(L, 500)
        hard = carry_all_along(problems)
        _, wrong = evaluate(model, problems)
        _, hard_wrong = evaluate(model, hard)
        print(f'{L:3} digits: {len(wrong)} wrong of {len(problems)}, '
              f'{len(hard_wrong)} of {len(hard)}')
        if L == longest:
            ask(problems[0])
            ask(hard[0])
