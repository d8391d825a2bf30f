# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "tiktoken"]
# ///
"""A GPT that reads a large corpus before it reads Shakespeare, and what that is worth.

    python pretrain_finetune.py                  pretrains, fine-tunes, and compares
    python pretrain_finetune.py --lora_rank=8    the same pretrained model, fine-tuned by LoRA
    python pretrain_finetune.py --reuse=False --corpus=book.txt    pretrains anew, on that text
    python pretrain_finetune.py --resume=True    goes on after Ctrl-C, or a crash

On Tiny Shakespeare, with 13.7 million characters of English prose as the corpus, 800 steps end at
a validation loss of 1.573 nats per character after pretraining, at 1.707 from scratch; the whole
takes 4 minutes (2-core x86 laptop-class CPU). With no network the corpus is docstrings: 1.592
against 1.709 on input.txt. FineWeb and the sizes for a GPU have not been measured yet.

What it has and gpt.py has not: a corpus that is fetched, mapped to the characters of input.txt and
kept on disk; three stages through one loop, each with its settings, text and checkpoint; LoRA; a
comparison. What gpt.py has and it has not: the ladder with its switches.
"""
import ast, codecs, difflib, hashlib, http.client, importlib.util, math, os, pathlib, signal, sys
import sysconfig, tempfile, time, timeit, unicodedata, urllib.request
import numpy as np, tiktoken, torch, torch.nn as nn, torch.nn.functional as F

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
mlp_width = 4  # how many times wider than that is the MLP inside?
dropout = 0.2 if on_gpu else 0.0  # which share of the activations is zeroed in training?
max_iters = 2000 if on_gpu else 800  # how many steps of training?
learning_rate = 1e-3 if on_gpu else 4e-3  # how far can a step go? Tuned on Tiny Shakespeare
warmup_iters = 100  # over how many steps does the learning rate rise to that?
weight_decay = 0.1  # how strongly are the matrices pulled towards zero?
beta2 = 0.99  # how long a memory does AdamW have for the size of gradients?
grad_clip = 1.0  # above which length is the gradient cut?
eval_interval = 400  # how many steps lie between two evaluations?
checkpoint = 'scratch_gpt.pt'  # where are the weights kept, and all that a resumed run needs?
resume = False  # go on from that file?
prompt = ''  # what does the sample go on from? '': token 0, in most texts the line break
temperature = 0.8  # how daring is the sample? Below 1 it prefers the likely
top_k = 0  # from how many of the likeliest characters is each one drawn? 0: from all
max_new_tokens = 500  # how many characters long is it?
# the lines above hold for training on input.txt; where pretrain_ or finetune_ stands before a name,
# it is what holds in that stage
pretrain_max_iters = 100_000 if on_gpu else 2500
pretrain_learning_rate = 3e-4 if on_gpu else 4e-3
pretrain_dropout = 0.0  # a large corpus is not learned by heart; a small text can be
pretrain_eval_interval = 1000 if on_gpu else 500
pretrain_checkpoint = 'pretrained_gpt.pt'
# lower, as long steps undo what is known: on a laptop twice that wins 0.006 and forgets 0.05 more
finetune_learning_rate = 1e-4 if on_gpu else 2e-3
finetune_checkpoint = 'finetuned_gpt.pt'
corpus = 'fineweb'  # what comes before input.txt? 'fineweb', 'docstrings', a path or an address
megabytes = 400 if on_gpu else 20  # how much of its text is read at most?
reuse = True  # is a pretrained model used that is already there?
compare = True  # is a model trained from scratch, too, to see what pretraining bought?
lora_rank = 0  # LoRA: how many directions of each matrix are fine-tuned? 0: all of the weights
lora_learning_rate = 2e-3 if on_gpu else 1.2e-2  # LoRA: how far can a step go?
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
for name in ('n_layer', 'n_head', 'n_embd', 'mlp_width', 'warmup_iters', 'grad_clip'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
for name in ('pretrain_eval_interval', 'megabytes'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
if n_embd % n_head: sys.exit(f'n_embd={n_embd} does not divide into n_head={n_head} equal heads')
if not 0 <= dropout < 1: sys.exit(f'dropout={dropout}: it must be at least 0 and below 1')
if lora_rank < 0: sys.exit(f'lora_rank={lora_rank}: it must be at least 0')
if dtype not in (choices := ('auto', 'float32', 'bfloat16', 'float16')):
    sys.exit(f'dtype={dtype}: not one of {choices}')
if not gpus.get(device, device == 'cpu'): sys.exit(f'device={device}: PyTorch finds {gpus} here')
# what each stage trains with: pretrain_learning_rate, say, or else learning_rate
stages = {stage: {name: globals().get(f'{stage}_{name}', globals()[name]) for name in (
    'max_iters', 'learning_rate', 'dropout', 'eval_interval', 'checkpoint')}
    for stage in ('pretrain', 'finetune', 'scratch')[:3 if compare else 2]}
if lora_rank: stages['finetune']['learning_rate'] = lora_learning_rate

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
    at = (start + torch.arange(block_size + 1)).to(train_data.device)
    xy = train_data[at].to(device).long()  # (B, T + 1)
    return xy[:, :-1], xy[:, 1:]

# FineWeb (Penedo et al. 2024) as tokens of GPT-2: 256 int32 (20240520, version 1, how many tokens,
# and zeros), then the tokens as uint16
shard = 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_train_000001.bin'

def download(address):
    """The first megabytes at the address, in pieces of text; a .bin is a shard of GPT-2's tokens.

    Raises OSError where there is no network, ValueError for what is damaged or too short."""
    is_shard = address.endswith('.bin')
    gpt2 = tiktoken.get_encoding('gpt2') if is_shard else None
    limit = megabytes * 10**6 // (2 if is_shard else 1)  # 2 bytes, a token, are over 4 characters
    utf8 = codecs.getincrementaldecoder('utf-8')()  # a piece can end within a character
    first = urllib.request.Request(address, headers={'Range': f'bytes=0-{limit + 1023}'})
    with urllib.request.urlopen(first, timeout=30) as response:
        size = response.length  # None where the server does not say
        if is_shard:
            header = np.frombuffer(response.read(1024).ljust(1024), '<i4')
            if header[:2].tolist() != [20240520, 1] or header[2] < 1:
                raise ValueError('this is no shard of tokens')
            size = 2 * int(header[2])
        left = min(limit, size or limit)
        while left > 0:
            piece = response.read(min(left, 2**20))
            left -= len(piece)
            if left and size and len(piece) < 2**20: raise ValueError(f'{left:,} bytes are missing')
            if not piece: break
            if is_shard:
                tokens = np.frombuffer(piece, '<u2')
                if tokens.max() > 50256: raise ValueError('it has tokens that GPT-2 has not')
                piece = gpt2.decode_bytes(tokens.tolist()).replace(b'<|endoftext|>', b'\n\n')
            yield utf8.decode(piece)

def docstrings():
    """What Python, torch and the packages that it needs say about themselves, in pieces."""
    found = map(importlib.util.find_spec, ('torch', 'numpy', 'sympy', 'networkx'))
    roots = [os.path.dirname(spec.origin) for spec in found if spec]
    roots.append(sysconfig.get_path('stdlib'))
    for folder, below, files in (step for root in roots for step in os.walk(root)):
        below[:] = sorted({*below} - {'site-packages', 'test', 'tests'})
        for file in sorted(file for file in files if file.endswith('.py')):
            source = pathlib.Path(folder, file).read_text(encoding='utf-8', errors='replace')
            # parsing takes the time: so only where there is much to be found
            if len(source) > 900 * source.count('"""'): continue
            try: nodes = [ast.parse(source)]
            except SyntaxError: continue
            for node in nodes:  # grows by what is defined inside
                nodes += [n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
                if words := ast.get_docstring(node): yield words + '\n\n'

def keep(pieces, path):
    """Write pieces of text into a file, all of them or none."""
    try:
        with open(path + '.tmp', 'w', encoding='utf-8', newline='') as file: file.writelines(pieces)
        os.replace(path + '.tmp', path)
    finally:
        pathlib.Path(path + '.tmp').unlink(missing_ok=True)

class Plain(dict):
    """For str.translate: a character -> chr of its id. One that is not in input.txt goes without
    its accent, or becomes the plain quote, dash or space; where that fails: chr(vocab_size)."""

    def __missing__(self, code):
        c = chr(code)
        name, plain = unicodedata.name(c, ''), unicodedata.normalize('NFKD', c)
        if 'QUOTATION' in name: plain = '"' if '"' in stoi and 'SINGLE' not in name else "'"
        elif unicodedata.category(c) == 'Pd': plain = '-'
        elif c.isspace(): plain = ' '
        ids = [stoi[p] for p in (c if c in stoi else plain) if p in stoi]
        self[code] = ''.join(map(chr, ids or [vocab_size]))
        return self[code]

def load(path):
    """A text of any size -> the ids of its first megabytes, on disk, and which share was dropped.

    An id is at first a character, too, since str.translate and str.encode are fast."""
    codec, kind = ('latin-1', np.uint8) if vocab_size < 256 else ('utf-16-le', np.int16)
    plain, dropped, read, lost = Plain(), chr(vocab_size), 0, 0
    with open(path, encoding='utf-8') as text, tempfile.TemporaryFile(dir='.') as file:
        while read < megabytes * 10**6 and (piece := text.read(2**20)):
            ids = piece.translate(plain)
            read, lost = read + len(piece), lost + ids.count(dropped)
            file.write(ids.replace(dropped, '').encode(codec))
        file.flush()
        if file.tell() < 10 * block_size: raise ValueError(f'{read - lost} characters are too few')
        return torch.from_numpy(np.memmap(file, kind, mode='r+')), lost / read

path, address = corpus, corpus if '://' in corpus else ''
if corpus == 'fineweb': path, address = f'fineweb-{megabytes}MB.txt', shard
elif corpus == 'docstrings': path = 'docstrings.txt'
elif address: path = f'corpus-{hashlib.sha256(address.encode()).hexdigest()[:8]}-{megabytes}MB.txt'
try:
    if address and not os.path.exists(path):
        print(f'corpus: fetching {path} from {address}', flush=True)
        try: keep(download(address), path)
        except OSError as error:
            if corpus != 'fineweb': raise
            path = 'docstrings.txt'
            print(f'corpus: that failed ({type(error).__name__}), so it is to be {path}, which is '
                  'English from the packages installed here')
    if path == 'docstrings.txt' and not os.path.exists(path): keep(docstrings(), path)
    corpus_data, lost = load(path)
except (OSError, ValueError, http.client.HTTPException) as error:
    sys.exit(f'corpus={corpus}: {error}; it can also be a text file of your own, or docstrings')
held = min(len(val_data), len(corpus_data) // 10)  # the last of it are for validation
texts = {'corpus': (corpus_data[:-held], corpus_data[-held:].to(device).long()),
         'input.txt': (train_data, val_data)}
print(f'corpus: {path}, {len(corpus_data):,} characters; {lost:.2%} had no place in the vocabulary')
print(f'input.txt: {len(data):,} characters, {vocab_size} different')

# ---------------------------------------------------------------- model
class Linear(nn.Linear):
    """A matrix W, x -> W x; after add_lora W + B A, of which only A and B are learned.

    LoRA (Hu et al. 2021): fine-tuning changes a matrix in few directions, so two thin ones are
    enough. (The paper adds a factor alpha / rank; here the learning rate does what that does.)"""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.register_parameter('lora_A', None)
        self.register_parameter('lora_B', None)

    def add_lora(self):
        """A is random, B zero: so at first nothing changes, and yet B has a gradient."""
        A = torch.randn(lora_rank, self.in_features) * self.in_features**-0.5
        self.lora_A = nn.Parameter(A.to(device))  # (rank, n_in)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, lora_rank, device=device))

    def forward(self, x):
        """(B, T, n_in) -> (B, T, n_out)"""
        y = super().forward(x)
        return y if self.lora_A is None else y + F.linear(F.linear(x, self.lora_A), self.lora_B)

def merged(weights):
    """A copy of the weights, as a plain GPT has them: each B A is added to its W."""
    plain = {name: t.clone() for name, t in weights.items() if 'lora' not in name}
    for name in weights:
        if name.endswith('lora_B'):
            layer = name.removesuffix('lora_B')
            plain[layer + 'weight'] += weights[name] @ weights[layer + 'lora_A']
    return plain

class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it what it needs (Vaswani et al. 2017)."""

    def __init__(self):
        super().__init__()
        self.c_attn = Linear(n_embd, 3 * n_embd)  # q, k and v of all heads at once
        self.c_proj = Linear(n_embd, n_embd)  # mixes what the heads found
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
        self.c_fc = Linear(n_embd, mlp_width * n_embd)  # wide
        self.c_proj = Linear(mlp_width * n_embd, n_embd)  # and back
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))  # GELU: Hendrycks & Gimpel 2016

class Block(nn.Module):
    """Positions talk (attention), then think (MLP): x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), CausalSelfAttention()  # each has its norm
        self.ln_2, self.mlp = nn.LayerNorm(n_embd), MLP()

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)  # which token it is
        self.wpe = nn.Embedding(block_size, n_embd)  # where it stands
        self.drop = nn.Dropout(dropout)
        self.h = nn.Sequential(*[Block() for _ in range(n_layer)])  # the hidden layers
        self.ln_f = nn.LayerNorm(n_embd)  # the final norm
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)  # channels -> logits
        self.lm_head.weight = self.wte.weight  # one table reads and writes (Press & Wolf 2017)
        # the gains are tuned, on Tiny Shakespeare; a layer whose output is added to the residual
        # stream starts the smaller, the more of them there are (Radford et al. 2019)
        for name, p in self.named_parameters():
            if name.startswith('h') and p.dim() == 2:
                gain = 0.8 / (2 * n_layer)**0.5 if 'c_proj' in name else 0.8
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

interrupts = []  # Ctrl-C makes the step at hand the last one
signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
clear = '\r' + ' ' * 79 + '\r' if sys.stdout.isatty() else ''  # a file gets no progress line
results = {}
for stage in stages:  # one loop for all, gpt.py's; they differ in text, weights and settings
    globals().update(stages[stage])
    name = 'corpus' if stage == 'pretrain' else 'input.txt'
    train_data, val_data = texts[name]
    torch.manual_seed(seed)
    model = GPT().to(device)
    must_fit = {'script': 'pretrain_finetune.py', 'stage': stage, 'chars': ''.join(chars),
                'block_size': block_size, 'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd,
                'mlp_width': mlp_width}
    if stage == 'pretrain': must_fit['corpus'] = path
    if stage == 'finetune':
        must_fit |= {'lora_rank': lora_rank, 'pretrained': min(val_losses, default=None)}
        model.load_state_dict(best)  # of pretraining
        if lora_rank:
            model.requires_grad_(False)
            for layer in model.h.modules():
                if isinstance(layer, Linear): layer.add_lora()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() == 2]
    vectors = [p for p in trained if p.dim() == 1]  # LayerNorm's: no pull towards zero
    optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                                   {'params': vectors, 'weight_decay': 0.0}],
                                  betas=(0.9, beta2), fused=True)
    scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')
    step, losses, val_losses, seconds, best = 0, [], [], 0.0, merged(model.state_dict())
    count, total = (sum(p.numel() for p in some) for some in (trained, model.parameters()))
    print(f'\n{stage} on {name}: {count:,} of {total:,} parameters ({count / total:.1%}) learn')
    reused = stage == 'pretrain' and reuse and not resume and os.path.exists(checkpoint)
    if reused or resume and (stage == 'pretrain' or os.path.exists(checkpoint)):
        try:
            saved = torch.load(checkpoint, map_location=device, weights_only=True)
            misfits = [f'{k}={v!r}'[:60] for k, v in saved['must_fit'].items()
                       if v != must_fit.get(k)]
        except Exception as error:  # a damaged file fails in many ways
            reason = (str(error) or type(error).__name__).splitlines()[0]
            sys.exit(f'cannot resume from {checkpoint}: {reason}'
                     + ('; --reuse=False makes it anew' if reused else ''))
        if misfits: sys.exit(f'cannot resume: {checkpoint} was made with {", ".join(misfits)}'
                             + ('; --reuse=False makes it anew' if reused else ''))
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        torch.set_rng_state(saved['random'].cpu())
        step, losses, val_losses, seconds, best = (
            saved[name] for name in ('step', 'losses', 'val_losses', 'seconds', 'best'))
        print(f'resumed from {checkpoint} after step {step}'
              + (' and used as it is (--reuse=False makes it anew)' if reused else ''))
        if reused: max_iters = step

    start, shown, first = time.time() - seconds, 0.0, step + 1
    for step in range(first, max_iters + 1):
        lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # a quarter of a cosine
        lr *= min(1, step / warmup_iters)
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
            # early stopping: once a small text is known by heart, its loss in validation rises
            if best_step == step: best = merged(model.state_dict())
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
    model = GPT().to(device)
    model.load_state_dict(best)
    result = results[stage] = {'best': best, 'seconds': seconds, 'trained': count}
    result['step'] = min(val_losses)[1] if val_losses else 0
    result['memory'] = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    for name, (_, val_data) in texts.items(): result[name] = evaluate()
    if interrupts: break

print('\nval loss on  corpus  input.txt  best step   seconds    trained   optimizer')
for stage, result in results.items():
    print(f"{stage:8} {result['corpus']:10.4f} {result['input.txt']:10.4f} {result['step']:10} "
          f"{result['seconds']:7.1f} s {result['trained']:10,} {result['memory'] / 2**20:7.2f} MiB")

def against(other, text):
    change = results['finetune'][text] - results[other][text]
    return f"{'lower' if change < 0 else 'higher'} by {abs(change):.4f} nats"

if 'finetune' in results:
    print(f"Fine-tuning has made the loss on the corpus {against('pretrain', 'corpus')}\n"
          f"and the loss on input.txt {against('pretrain', 'input.txt')}.")
if 'scratch' in results:
    print(f'After {len(losses)} steps on input.txt, pretrained and not from scratch, the loss is '
          + against('scratch', 'input.txt'))

# ---------------------------------------------------------------- sampling
signal.signal(signal.SIGINT, lambda *_: sys.exit())  # all is saved: Ctrl-C just ends the sample
for stage in ('pretrain', 'finetune')[:len(results)]:
    model.load_state_dict(results[stage]['best'])
    model.eval()
    torch.manual_seed(seed)  # the same draws for both
    print(f'{stage} ends with a model that writes:')
    idx = torch.tensor([encode(prompt) or [0]], device=device)  # (1, T)
    print('-' * 64 + '\n' + prompt, end='')
    model.generate(idx, max_new_tokens, temperature, top_k,
                   lambda token: print(decode(token[0]), end='', flush=True))
    print()
