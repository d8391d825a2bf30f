# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "tiktoken"]
# ///
"""Pretrain a GPT on a large text, fine-tune it on Shakespeare, measure what that was worth.

    python pretrain_finetune.py                     pretrain, fine-tune, compare
    python pretrain_finetune.py --corpus=book.txt   pretrain on another text
    python pretrain_finetune.py --resume            continue (repeat the other settings, too)
    python pretrain_finetune.py --resume --lora_rank=8     the same, and fine-tune with LoRA

On 2 cores of an AMD EPYC the three stages take 94 s (161 s in float32 with AVX2, as on most
Intel laptops). With the docstrings of Python 3.11.7 and PyTorch 2.13.0 as the corpus, the
fine-tuned model reaches 1.61 nats per character on input.txt; the model from scratch, with as
many steps on input.txt, 1.73.

torch.load('finetuned_gpt.pt')['best'] holds the fine-tuned weights. To sample from them:
python gpt.py --resume --checkpoint=finetuned_gpt.pt --max_iters=0

New since gpt.py (diff -w shows it): a corpus; the training loop as a function, called once for
each stage; LoRA. Not here: the ladder.
"""
import copy, glob, math, os, re, signal, sys, sysconfig, time, unicodedata, urllib.request, zlib
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
init_gain = 0.8  # initial matrices have standard deviation init_gain / sqrt(columns)
c_proj_gain = 0.3  # likewise for c_proj layers, which write to the residual stream
max_iters = 5000 if device == 'cuda' else 1600  # training steps on input.txt
learning_rate = 1e-3 if device == 'cuda' else 3e-3  # peak, from scratch (tuned for the CPU)
warmup_ratio = 0.04  # fraction of the steps over which the learning rate rises
weight_decay = 0.1  # pulls matrices toward 0
beta2 = 0.99  # AdamW averages squared gradients over 1 / (1 - beta2) steps
grad_clip = 1.0  # clip the gradient norm at this value (0 = do not)
eval_interval = 500 if device == 'cuda' else 1200  # evaluate every this many steps
resume = False  # keep finished stages and continue the one that was interrupted
prompt = ''  # text to continue ('': the first character of the vocabulary, not shown)
temperature = 0.8  # below 1: safer; above 1: more surprising
top_k = 0  # sample from the k most likely characters (0 = all, 1 = greedy)
max_new_tokens = 500  # characters to write
# pretraining and fine-tuning
corpus = 'fineweb' if device == 'cuda' else 'docstrings'  # or a text file or URL
megabytes = 100 if device == 'cuda' else 20  # of the corpus, at most
pretrain_max_iters = 10000 if device == 'cuda' else 7000  # steps on the corpus
pretrain_learning_rate = 1e-3 if device == 'cuda' else 2e-3  # peak
finetune_learning_rate = 3e-4 if device == 'cuda' else 2e-3  # peak; a lower one forgets less
lora_rank = 0  # rank of the LoRA stage (0 = no such stage); delete lora_gpt.pt to change it
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

# ------------------------------------------------------------------ data
# input.txt can be any UTF-8 text; if missing, Tiny Shakespeare (Karpathy 2015) is downloaded
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
if not os.path.exists('input.txt'):
    assert not resume, 'put the input.txt of the earlier run into this folder'
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

def get_batch(train_data):
    """Random sequences x (B = batch_size, T = block_size); y is x shifted by one character."""
    start = torch.randint(len(train_data) - block_size, (batch_size, 1))  # (B, 1)
    xy = train_data[(start + torch.arange(block_size + 1)).to(device)]  # (B, T + 1)
    return xy[:, :-1], xy[:, 1:]

# The corpus is a large text. FineWeb, text from the web (Penedo et al. 2024), comes as GPT-2
# tokens: a header of 1024 bytes that begins with the number 20240520, then 2 bytes a token.
fineweb = ('https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/'
           'fineweb_train_000001.bin')

def docstrings():
    """A corpus without a download: the docstrings of Python and PyTorch."""
    found = []
    for folder in sysconfig.get_path('stdlib'), torch.__path__[0]:
        for path in sorted(glob.glob('**/*.py', root_dir=folder, recursive=True)):
            if not re.search('site-packages|test', path):  # no other packages, no tests
                with open(f'{folder}/{path}', encoding='utf-8', errors='replace') as file:
                    found += re.findall('"""(.+?)"""', file.read(), re.S)
    return re.sub(r'\n[ \t]+', '\n', '\n\n'.join(found))  # without indentation

def first_bytes(source, size):
    """At most size bytes of a file or a URL. A download is kept as a file."""
    path = source
    if '://' in source:
        path = f'corpus_{megabytes}MB_' + re.sub(r'\W+', '_', source)
        if not os.path.exists(path):
            print('downloading', source)
            request = urllib.request.Request(source, headers={'Range': f'bytes=0-{size - 1}'})
            # a server may ignore Range and send it all
            download = urllib.request.urlopen(request, timeout=30).read()[:size]
            with open(path + '.tmp', 'wb') as file:
                file.write(download)
            os.replace(path + '.tmp', path)
    with open(path, 'rb') as file:
        return file.read(size)

def read_corpus():
    """The beginning of the corpus (see megabytes), as text."""
    size = megabytes * 10**6
    if corpus == 'docstrings':
        return docstrings()[:size]
    if corpus == 'fineweb':
        raw = first_bytes(fineweb, 1024 + size // 2)  # 2 bytes for about 4 characters
        assert int.from_bytes(raw[:4], 'little') == 20240520, 'not GPT-2 tokens: delete corpus_*'
        tokens = np.frombuffer(raw, '<u2', offset=1024).tolist()
        return tiktoken.get_encoding('gpt2').decode(tokens).replace('<|endoftext|>', '\n\n')
    return first_bytes(corpus, size).decode('utf-8-sig', errors='replace')

def plain(text):
    """The text in the characters of input.txt. What has no equivalent there is dropped."""
    quote = '"' if '"' in stoi else "'"  # Tiny Shakespeare has no double quotes
    substitutes = {'"': quote, '“': quote, '”': quote, '‘': "'", '’': "'",
                   '–': '-', '—': '-', '\t': ' '}
    table = {}
    for c in set(text) - set(chars):
        parts = unicodedata.normalize('NFKD', substitutes.get(c, c))  # é: e and an accent
        table[ord(c)] = ''.join(part for part in parts if part in stoi)
    return text.translate(table)

original = read_corpus()
corpus_text = plain(original)
print(f'{device}, {dtype}; {len(data):,} characters, {vocab_size} distinct; '
      f'corpus: {len(original):,} characters, {len(corpus_text):,} after conversion')
assert len(corpus_text) >= len(original) / 2, f'{corpus}: most characters are not in input.txt'
corpus_data = torch.tensor(encode(corpus_text), device=device)
n = max(int(0.9 * len(corpus_data)), len(corpus_data) - 100_000)
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

class LoRA(nn.Linear):
    """A linear layer with the matrix W + B A (Hu et al. 2021). W (n_out, n_in) is frozen; only
    A (rank, n_in) and B (n_out, rank) are trained: far fewer numbers."""

    def __init__(self, W, rank):
        n_out, n_in = W.shape
        super().__init__(n_in, n_out, bias=False)
        self.weight = W  # frozen by add_lora
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

# ------------------------------------------------------------------ training
sizes = dict(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
             mlp_width=mlp_width)
assert n_embd % n_head == 0, f'n_embd ({n_embd}) must be a multiple of n_head ({n_head})'
assert len(val_data) > block_size, f'input.txt needs {10 * block_size + 1} characters'
assert len(corpus_val) > block_size, f'{corpus} needs {10 * block_size + 1} characters'
assert not resume or os.path.isfile('pretrained_gpt.pt'), 'no pretrained_gpt.pt to resume'
assert temperature > 0, 'temperature must be above 0'
# a model that has read the validation text would look too good; white space may differ
squeeze = lambda s: s.replace(' ', '').replace('\n', '')
squeezed = squeeze(corpus_text)
for i in range(20):
    start = len(train_data) + i * max(0, len(val_data) - 200) // 19
    piece = text[start:start + 200]
    assert squeeze(piece) not in squeezed, f'{corpus} contains validation text: {piece[:50]!r}'

# mixed precision: matrix products in dtype; softmax, LayerNorm and the loss in float32
device_type = torch.device(device).type  # 'cuda:1' -> 'cuda'
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')

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

stages = ['pretrained', 'finetuned', 'scratch', 'lora']  # their files: pretrained_gpt.pt, ...

def set_aside(names):
    """Rename the checkpoints of these stages: a later --resume must not take them for its own."""
    for checkpoint in [f'{name}_gpt.pt' for name in names]:
        if os.path.isfile(checkpoint):
            os.replace(checkpoint, checkpoint + '.old')
            print(f'renamed the earlier {checkpoint} to {checkpoint}.old')

stop = False
def interrupt(*_):
    """First Ctrl-C: end training after the current step. Second: stop at once."""
    global stop
    stop = True
    signal.signal(signal.SIGINT, signal.default_int_handler)

def train(stage, model, train_data, val_data, max_iters, learning_rate):
    """Train the model and leave it with its best weights: those of the lowest validation loss.
    With resume, an unfinished stage continues; a finished one is only loaded."""
    if stop:
        return  # Ctrl-C in an earlier stage
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f'\n{stage}: {n_trainable:,} trainable parameters')
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # LayerNorm: not decayed
    optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                                   {'params': vectors, 'weight_decay': 0.0}],
                                  betas=(0.9, beta2), fused=True)
    # only float16 needs it: a larger loss keeps small gradients from rounding to zero
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

    checkpoint = f'{stage}_gpt.pt'
    step = 0
    train_loss = 0.0  # running mean of about the last 100 steps
    best_loss = math.inf  # lowest validation loss
    best = {}  # the weights that reached it
    if resume and os.path.isfile(checkpoint):
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        assert saved['checksum'] == checksum, f'{checkpoint} was trained on another input.txt'
        assert saved['sizes'] == sizes, f'{checkpoint} was trained with {saved["sizes"]}'
        model.load_state_dict(saved['model'])
        # use this run's betas and weight decay, not the saved ones
        saved['optimizer']['param_groups'] = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict(saved['optimizer'])
        step, train_loss = saved['step'], saved['train_loss']
        best, best_loss = saved['best'], saved['best_loss']
        print(f'loaded {checkpoint}, saved after step {step}')

    def save():
        """Write a new file, then rename it: a killed run leaves the old file or the new one."""
        torch.save(dict(sizes=sizes, checksum=checksum, step=step, train_loss=train_loss,
                        model=model.state_dict(), optimizer=optimizer.state_dict(),
                        best=best, best_loss=best_loss), checkpoint + '.tmp')
        os.replace(checkpoint + '.tmp', checkpoint)

    if step < max_iters:
        open(checkpoint + '.tmp', 'wb').close()  # if files cannot be written, fail now, not later
        set_aside(stages[stages.index(stage) + 1:])  # later stages train anew
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
        x, y = get_batch(train_data)
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
    if stop:
        save()
        print(f'stopped after step {step}')
    if best:
        model.load_state_dict(best)
    model.eval()

if not resume:
    set_aside(stages)
signal.signal(signal.SIGINT, interrupt)

# a model goes in and comes out trained
torch.manual_seed(seed)
pretrained = GPT().to(device)
scratch = copy.deepcopy(pretrained)  # the same first weights
train('pretrained', pretrained, corpus_train, corpus_val,
      pretrain_max_iters, pretrain_learning_rate)
finetuned = copy.deepcopy(pretrained)
train('finetuned', finetuned, train_data, val_data, max_iters, finetune_learning_rate)
train('scratch', scratch, train_data, val_data, max_iters, learning_rate)
models = {'pretrained': pretrained, 'finetuned': finetuned, 'scratch': scratch}
if lora_rank > 0:
    torch.manual_seed(seed)
    models['lora'] = copy.deepcopy(pretrained)
    add_lora(models['lora'], lora_rank)
    train('lora', models['lora'].to(device), train_data, val_data, max_iters, lora_learning_rate)

signal.signal(signal.SIGINT, signal.default_int_handler)
if not stop:
    print('\nval loss on    corpus  input.txt')
    for stage, model in models.items():
        print(f'{stage:10} {evaluate(model, corpus_val):10.4f} {evaluate(model, val_data):10.4f}')

# ------------------------------------------------------------------ sampling
sample(finetuned, max_new_tokens)
