# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "tiktoken"]
# ///
"""Pretrain a GPT on modern prose, then fine-tune it on Shakespeare.

    python pretrain_finetune.py                     pretrain, fine-tune, compare
    python pretrain_finetune.py --corpus=book.txt   pretrain on another text
    python pretrain_finetune.py --resume            continue (repeat the other settings, too)
    python pretrain_finetune.py --resume --lora_rank=8     also fine-tune with LoRA

On 2 cores of an AMD EPYC the three stages take 103 s. With docstrings
as the corpus the fine-tuned model reaches 1.611 nats per character on
input.txt; the one from scratch, with as many steps on input.txt, 1.729.
FineWeb has not been measured yet.

New since gpt.py (diff -w shows it): a corpus; the training loop as a
function, called once for each stage; LoRA. Not here: the ladder.
"""
import glob, http.client, math, os, re, signal, sys, sysconfig, time
import unicodedata, urllib.request, zlib
import numpy as np
import tiktoken
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
init_gain = 0.8  # initial weights have standard deviation init_gain / sqrt(inputs)
c_proj_gain = 0.3  # likewise for c_proj layers, which write to the residual stream
max_iters = 5000 if device == 'cuda' else 1600  # training steps on input.txt
learning_rate = 1e-3 if device == 'cuda' else 3e-3  # peak, from scratch (tuned for the CPU)
warmup_iters = 100  # warm-up steps
weight_decay = 0.1  # pulls matrices toward 0
beta2 = 0.99  # AdamW averages squared gradients over 1 / (1 - beta2) steps
grad_clip = 1.0  # clip the gradient norm at this value
eval_interval = 500 if device == 'cuda' else 1200  # evaluate every this many steps
resume = False  # keep finished stages and continue the one that was interrupted
prompt = ''  # text to continue ('': start with the first character of the vocabulary)
temperature = 0.8  # below 1: safer; above 1: more surprising
top_k = 0  # sample from the k most likely characters (0 = all, 1 = greedy)
max_new_tokens = 500  # characters to write
# pretraining and fine-tuning
corpus = 'fineweb'  # 'fineweb', 'docstrings', a text file or a URL
megabytes = 100 if device == 'cuda' else 20  # of the corpus, at most
pretrain_max_iters = 10000 if device == 'cuda' else 7000  # steps on the corpus
pretrain_learning_rate = 1e-3 if device == 'cuda' else 2e-3  # peak
finetune_learning_rate = 3e-4 if device == 'cuda' else 2e-3  # peak; a lower one forgets less
lora_rank = 0  # rank of the LoRA stage (0 = no such stage)
lora_learning_rate = 2e-3 if device == 'cuda' else 1.2e-2  # peak

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
device_type = device.split(':')[0]  # 'cuda:1' -> 'cuda'
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')

# ------------------------------------------------------------------ data
# input.txt can be any UTF-8 text; if missing, Tiny Shakespeare (Karpathy 2015) is downloaded
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
if not os.path.exists('input.txt'):
    assert not resume, 'put the input.txt of the earlier run into this folder'
    print('no input.txt in this folder; downloading', url)
    download = urllib.request.urlopen(url, timeout=30).read()  # an error if it is cut short
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

def get_batch(train_data):
    """Random sequences x (B = batch_size, T = block_size); y is x shifted by one character."""
    start = torch.randint(len(train_data) - block_size, (batch_size, 1))  # a column
    xy = train_data[(start + torch.arange(block_size + 1)).to(device)]  # (B, T + 1)
    return xy[:, :-1], xy[:, 1:]

# The corpus is a large text, converted to the characters of input.txt. FineWeb (Penedo
# et al. 2024) is stored as GPT-2 tokens, about four characters each: 256 int32 (20240520,
# 1, the number of tokens, zeros), then the tokens as uint16.
fineweb = ('https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/'
           'fineweb_train_000001.bin')

def fetch(url, size):
    """The first size bytes at a URL, or all if there are fewer."""
    headers = {'Range': f'bytes=0-{size - 1}'}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        # a server may ignore Range and send it all
        return response.read()[:size]

def decode_shard(raw):
    """The text of a file of GPT-2 tokens, or of its beginning."""
    magic, version, count = np.frombuffer(raw, '<i4', count=3)
    assert magic == 20240520, 'not a file of GPT-2 tokens'
    tokens = np.frombuffer(raw, '<u2', offset=1024)
    assert len(tokens) == min(count, megabytes * 250_000), 'incomplete file'
    text = tiktoken.get_encoding('gpt2').decode(tokens.tolist())
    return text.replace('<|endoftext|>', '\n\n')

def docstrings():
    """A corpus without a download: the docstrings of Python and PyTorch."""
    found = []
    for folder in sysconfig.get_path('stdlib'), torch.__path__[0]:
        for path in sorted(glob.glob(f'{glob.escape(folder)}/**/*.py', recursive=True)):
            if re.search('site-packages|test', path.removeprefix(folder)):
                continue  # skip other packages and tests
            with open(path, encoding='utf-8', errors='replace') as file:
                found += re.findall('"""(.+?)"""', file.read(), re.S)
    return re.sub(r'\n[ \t]+', '\n', '\n\n'.join(found))  # without indentation

def read_corpus(corpus):
    """The beginning of a corpus (see megabytes). Downloads are kept as files."""
    size = megabytes * 10**6
    if corpus == 'docstrings':
        return docstrings()[:size]
    path = corpus
    url = fineweb if corpus == 'fineweb' else corpus
    if '://' in url:
        path = re.sub(r'\W+', '_', corpus) + f'_{megabytes}MB.txt'
        if not os.path.exists(path):
            print('downloading', url)
            if url.endswith('.bin'):
                # a header, then 2 bytes for about 4 characters
                text = decode_shard(fetch(url, 1024 + size // 2))
            else:
                text = fetch(url, size).decode('utf-8-sig', errors='replace')
            part = f'{path}.{os.getpid()}.tmp'
            with open(part, 'w', encoding='utf-8', newline='') as file:
                file.write(text)
            os.replace(part, path)
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        return file.read(size)

def plain(text):
    """The text in the characters of input.txt: é becomes e, curly quotes become straight.
    Characters without an equivalent are dropped."""
    # Tiny Shakespeare has no double quotes
    quote = '"' if '"' in stoi else "'"
    substitutes = {'"': quote, '“': quote, '”': quote, '‘': "'", '’': "'",
                   '–': '-', '—': '-', '\t': ' '}
    table = {}
    for c in set(text) - set(chars):
        # é: e and an accent
        parts = unicodedata.normalize('NFKD', substitutes.get(c, c))
        table[ord(c)] = ''.join(part for part in parts if part in stoi)
    return text.translate(table)

print(f'{device}, {dtype}; {len(data):,} characters, {vocab_size} distinct')
try:
    corpus_text = read_corpus(corpus)
except (OSError, AssertionError, http.client.HTTPException) as error:
    if corpus != 'fineweb':
        raise
    print(f'could not get FineWeb ({error}); using --corpus=docstrings')
    corpus = 'docstrings'
    corpus_text = read_corpus(corpus)
corpus_data = torch.tensor(encode(plain(corpus_text)), device=device)
print(f'corpus: {len(corpus_text):,} characters; '
      f'{len(corpus_data):,} after conversion')
n = len(corpus_data)
n = n - min(n // 10, 100_000)  # the rest is for validation
corpus_train = corpus_data[:n]
corpus_val = corpus_data[n:]

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
        self.wpe = nn.Embedding(block_size, n_embd)  # where it stands
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

class LoRA(nn.Linear):
    """A linear layer with the matrix W + B A (Hu et al. 2021). add_lora freezes
    W (n_out, n_in). Only A (rank, n_in) and B (n_out, rank) are trained: far fewer numbers."""

    def __init__(self, W, rank):
        n_out, n_in = W.shape
        super().__init__(n_in, n_out, bias=False)
        self.weight = W
        self.A = nn.Parameter(torch.randn(rank, n_in) * n_in ** -0.5)
        self.B = nn.Parameter(torch.zeros(n_out, rank))  # so at first B A is zero

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T

def add_lora(model, rank):
    """Freeze the model and add a trainable B A to each matrix of its blocks."""
    model.requires_grad_(False)
    for block in model.h:
        block.attn.c_attn = LoRA(block.attn.c_attn.weight, rank)
        block.attn.c_proj = LoRA(block.attn.c_proj.weight, rank)
        block.mlp.c_fc = LoRA(block.mlp.c_fc.weight, rank)
        block.mlp.c_proj = LoRA(block.mlp.c_proj.weight, rank)

def merged(weights):
    """The weights of a plain GPT: each W + B A becomes one matrix."""
    weights = dict(weights)
    for name in list(weights):
        if name.endswith('.A'):
            layer = name.removesuffix('.A')
            A = weights.pop(layer + '.A')
            B = weights.pop(layer + '.B')
            weights[layer + '.weight'] = weights[layer + '.weight'] + B @ A
    return weights

# ------------------------------------------------------------------ training
if resume:
    saved = torch.load('pretrained_gpt.pt', map_location=device, weights_only=True)
    assert saved['chars'] == chars, 'pretrained_gpt.pt belongs to another input.txt'
    globals().update(saved['sizes'])
    override()  # typed sizes must match: see the next assert
sizes = dict(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
             mlp_width=mlp_width)
if resume:
    assert sizes == saved['sizes'], f'pretrained_gpt.pt was trained with {saved["sizes"]}'
assert n_embd % n_head == 0, f'n_embd ({n_embd}) must be a multiple of n_head ({n_head})'
assert len(val_data) > block_size, f'input.txt needs {10 * block_size + 1} characters'
converted = len(corpus_data) / max(1, len(corpus_text))
assert converted > 0.5, f'{corpus}: most of its characters are not in input.txt'
assert len(corpus_val) > block_size, f'{corpus} needs {10 * block_size + 10} characters'
assert temperature > 0, 'temperature must be above 0'
assert abs(seed) < 10**12, 'seed: at most 12 digits'  # seed * 10**6 must fit in 64 bits

@torch.no_grad()
@autocast
def evaluate(model, val_data):
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

stop = []  # Ctrl-C appends to it
def interrupt(*_):
    """First Ctrl-C: end training after the current step. Second: stop at once."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop.append(True)

def report(line):
    """Print a line; if that fails (its reader has quit), save and stop."""
    try:
        print(line)
    except OSError:
        stop.append(True)

def train(stage, start, train_data, val_data, max_iters, learning_rate, lora_rank=0):
    """Train a model from the weights in start ({}: random) and return the weights
    with the lowest validation loss. The checkpoint is {stage}_gpt.pt. Arguments replace the
    constants of the same name."""
    if stop:
        return start  # after Ctrl-C in an earlier stage
    torch.manual_seed(seed)
    model = GPT()
    if start:
        model.load_state_dict(start)
    if lora_rank > 0:
        add_lora(model, lora_rank)
    model.to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    n_trainable = sum(p.numel() for p in trainable)
    n_total = sum(p.numel() for p in model.parameters())
    report(f'\n{stage}: {n_trainable:,} of {n_total:,} parameters are trainable')
    matrices = [p for p in trainable if p.dim() == 2]
    vectors = [p for p in trainable if p.dim() == 1]  # LayerNorm: not decayed
    optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                                   {'params': vectors, 'weight_decay': 0.0}],
                                  betas=(0.9, beta2), fused=True)
    # scales the loss: small gradients would vanish in float16
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

    # a checkpoint with another origin is not resumed; repeat other settings, as in gpt.py
    origin = [sizes, seed, learning_rate, lora_rank]
    for tensor in [train_data, *start.values()]:
        origin.append(zlib.crc32(tensor.cpu().numpy()))  # a checksum
    checkpoint = f'{stage}_gpt.pt'
    saved = {}
    if resume and os.path.isfile(checkpoint):
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved.get('origin') != origin:
            # a mistyped setting must not cost the pretraining
            assert stage != 'pretrained', f'to resume {checkpoint} repeat its settings and corpus'
            report(f'{checkpoint} has other settings: starting over')
            saved = {}
    step = 0
    train_loss = 0.0  # running mean of about the last 100 steps
    best_loss = math.inf  # lowest validation loss
    best = {}  # the weights that reached it
    if saved:
        model.load_state_dict(saved['model'])
        # use this run's betas and weight decay, not the saved ones
        saved['optimizer']['param_groups'] = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict(saved['optimizer'])
        if saved['scaler']:  # empty unless it was trained in float16
            scaler.load_state_dict(saved['scaler'])
        step = saved['step']
        train_loss = saved['train_loss']
        best_loss = saved['best_loss']
        best = saved['best']
        report(f'loaded {checkpoint}, saved after step {step}')

    temporary = f'{checkpoint}.{os.getpid()}.tmp'  # unique to this process
    if step < max_iters:
        open(temporary, 'wb').close()  # if files cannot be written, fail now, not in an hour
        os.remove(temporary)
        if os.path.isfile(checkpoint) and not saved:
            os.replace(checkpoint, checkpoint + '.old')
            report(f'renamed the earlier {checkpoint} to {checkpoint}.old')

    def save():
        """Write a temporary file, then rename it: a killed run never leaves half a checkpoint."""
        state = dict(sizes=sizes, optimizer=optimizer.state_dict(),
                     scaler=scaler.state_dict(), model=model.state_dict(), best=best,
                     chars=chars, step=step, train_loss=train_loss, best_loss=best_loss,
                     origin=origin, checksum=checksum)
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
        x, y = get_batch(train_data)
        with autocast:  # matrix products in dtype; softmax, LayerNorm and the loss in float32
            logits, loss = model(x, y)
        model.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()

        train_loss += (loss.item() - train_loss) / min(step, 100)
        assert math.isfinite(train_loss), f'the loss is {loss}; lower the learning rate'
        if step % max(1, max_iters // 20) == 0:  # 60 stars: as bad as guessing
            stars = '*' * int(60 * min(1, train_loss / math.log(max(2, vocab_size))))
            report(f'{step:6} {stars}')
        if step % eval_interval == 0 or step == max_iters:
            val_loss = evaluate(model, val_data)
            assert math.isfinite(val_loss), f'the loss is {val_loss}; lower the learning rate'
            if val_loss < best_loss:
                best_loss = val_loss
                best = {name: p.clone() for name, p in model.state_dict().items()}
            save()
            report(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
                   f'{time.time() - start_time:.1f} s')
        if stop:
            save()
            report(f'stopped after step {step}')
            break
    # best is empty before the first evaluation
    return merged(best or model.state_dict())

# rename all now: a later --resume must not find another run's stages
if not resume:
    for old in 'pretrained_gpt.pt', 'finetuned_gpt.pt', 'scratch_gpt.pt', 'lora_gpt.pt':
        if os.path.isfile(old):
            os.replace(old, old + '.old')
            print(f'renamed the earlier {old} to {old}.old')

signal.signal(signal.SIGINT, interrupt)
pretrained = train('pretrained', {}, corpus_train, corpus_val,
                   pretrain_max_iters, pretrain_learning_rate)
finetuned = train('finetuned', pretrained, train_data, val_data,
                  max_iters, finetune_learning_rate)
scratch = train('scratch', {}, train_data, val_data,
                max_iters, learning_rate)
stages = {'pretrained': pretrained, 'finetuned': finetuned, 'scratch': scratch}
if lora_rank > 0:
    stages['lora'] = train('lora', pretrained, train_data, val_data,
                           max_iters, lora_learning_rate, lora_rank)
signal.signal(signal.SIGINT, signal.default_int_handler)

model = GPT().to(device)
if not stop:
    print('\nval loss on    corpus  input.txt')
    for stage, weights in stages.items():
        model.load_state_dict(weights)
        corpus_loss = evaluate(model, corpus_val)
        val_loss = evaluate(model, val_data)
        print(f'{stage:10} {corpus_loss:10.4f} {val_loss:10.4f}')

# ------------------------------------------------------------------ sampling
model.load_state_dict(finetuned)
model.eval()
print('-' * 64 + '\n' + prompt, end='')
idx = torch.tensor([encode(prompt or chars[0])], device=device)  # (1, T)
for token in model.generate(idx, max_new_tokens, temperature, top_k):
    print(decode(token[0]), end='', flush=True)
print()
