# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "tiktoken"]
# ///
"""GPT-2 itself: its weights, its vocabulary, its training on one machine or many, its scores.

    python gpt2.py                          trains a small GPT-2 on input.txt, then writes
    python gpt2.py --init_from=gpt2 --max_iters=0 --prompt="Once upon a time"   OpenAI's weights
    torchrun --standalone --nproc_per_node=8 gpt2.py     trains on eight GPUs, on web text
    python gpt2.py --init_from=resume       goes on after Ctrl-C, or a crash

The defaults take 2 minutes (2-core x86 laptop-class CPU) and end at 2.226 bits per byte of
input.txt; a run of 72 s ends at 2.292, where gpt.py ends at 2.348 after 78 s. With CUDA it is
GPT-2 with 124M parameters on FineWeb-Edu; that has not been measured yet.

It can be imported: from gpt2 import GPT, GPTConfig; then GPT(GPTConfig(n_layer=2)),
GPT.from_pretrained('gpt2') and model.generate(idx, max_new_tokens=100).

What it has and gpt.py has not: tokens of several bytes (BPE), learned or GPT-2's; weights in the
safetensors format, read and written; biases, the tanh GELU; shards of ready tokens; gradients
summed over micro-batches and processes; bits per byte, HellaSwag; a key/value cache.
"""
import codecs, collections, dataclasses, difflib, hashlib, heapq, http.client, json, math, os
import pathlib, pickle, re, signal, struct, sys, time, timeit, urllib.request
import numpy as np, tiktoken, torch, torch.distributed as dist, torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- hyperparameters
gpus = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
device = 'cpu' if '--device=cpu' in sys.argv else next((d for d in gpus if gpus[d]), 'cpu')
on_gpu = device == 'cuda'  # then the larger of the two sizes below: GPT-2 with 124M parameters
dtype = 'auto'  # the type of number in matrix products: 'float32', 'bfloat16', 'float16', 'auto'
seed = 1337  # the same seed and settings give the same losses
init_from = 'scratch'  # which weights? 'scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large',
#                        'gpt2-xl', a .safetensors file, or a folder with one
dataset = 'fineweb-edu' if on_gpu else 'input.txt'  # a text, 'fineweb', or a folder of shards
n_shards = 10 if on_gpu else 1  # how many shards of web text, of 100 million tokens each?
vocab_size = 1024  # how many tokens has a vocabulary that is learned from a text?
total_batch_size = 524288 if on_gpu else 2048  # from how many tokens does one step learn?
batch_size = 32  # how many windows of them at once, on each device?
block_size = 1024 if on_gpu else 64  # how many tokens does a window have?
n_layer = 12 if on_gpu else 3  # how many blocks are stacked?
n_head = 12 if on_gpu else 4  # in how many heads does each block look back?
n_embd = 768 if on_gpu else 128  # how many channels carry a token through the blocks?
dropout = 0.0  # which share of the activations is zeroed in training?
max_iters = 19073 if on_gpu else 1200  # how many steps of training?
learning_rate = 6e-4 if on_gpu else 4e-3  # how far can a step go? 4e-3: tuned on input.txt
warmup_iters = 700 if on_gpu else 100  # over how many steps does the learning rate rise to that?
weight_decay = 0.1  # how strongly are the matrices pulled towards zero?
beta2 = 0.95 if on_gpu else 0.99  # how long a memory does AdamW have for the size of gradients?
grad_clip = 1.0  # above which length is the gradient cut?
eval_interval = 500  # how many steps lie between two evaluations?
eval_tokens = 10_485_760  # how many tokens are scored at most?
use_compile = on_gpu  # are the operations of a step fused, by torch.compile?
checkpoint = 'gpt2.pt'  # where are the weights kept, and all that a resumed run needs?
cache_dir = '~/.cache/gpt2.py'  # where is kept what was downloaded or tokenized?
export = ''  # a folder, for the weights in the format that the transformers library loads
hellaswag = False  # is the model scored on HellaSwag at the end?
hellaswag_limit = 10042  # on how many of its questions?
prompt = ''  # what does the sample go on from? '': a line break; for GPT-2 <|endoftext|>
temperature = 0.8  # how daring is the sample? Below 1 it prefers the likely
top_k = 0  # from how many of the likeliest tokens is each one drawn? 0: from all
top_p = 0.95  # from the likeliest tokens that together have which chance?
max_new_tokens = 200  # how many tokens long is it?
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
for name in ('n_layer', 'n_head', 'n_embd', 'warmup_iters', 'grad_clip'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
for name in ('total_batch_size', 'n_shards', 'eval_tokens', 'hellaswag_limit', 'top_p'):
    if not globals()[name] > 0: sys.exit(f'{name}={globals()[name]}: it must be above 0')
if n_embd % n_head: sys.exit(f'n_embd={n_embd} does not divide into n_head={n_head} equal heads')
if not 0 <= dropout < 1: sys.exit(f'dropout={dropout}: it must be at least 0 and below 1')
if not 257 <= vocab_size <= 65536: sys.exit(f'vocab_size={vocab_size}: it must be 257 to 65536')
if dtype not in (choices := ('auto', 'float32', 'bfloat16', 'float16')):
    sys.exit(f'dtype={dtype}: not one of {choices}')
if not gpus.get(device, device == 'cpu'): sys.exit(f'device={device}: PyTorch finds {gpus} here')
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # of torchrun

def milliseconds(number_type):
    """Time of the fastest of five products of two (512, 512) matrices on the CPU."""
    a = torch.ones(512, 512, dtype=number_type)
    return 1000 * min(timeit.repeat(lambda: a @ a, number=1, repeat=5))

def row_milliseconds(name):
    """Time of the fastest of five products of one row and a (768, 16384) matrix of this type."""
    row, matrix = (torch.ones(n, 768, dtype=getattr(torch, name)) for n in (1, 16384))
    return 1000 * min(timeit.repeat(lambda: F.linear(row, matrix), number=1, repeat=5))

# ---------------------------------------------------------------- data
hub, cache_dir = 'https://huggingface.co', os.path.expanduser(cache_dir)
weights = hub + '/openai-community/{}/resolve/main/model.safetensors'  # of gpt2, gpt2-medium, ...
shards = {'fineweb': hub + '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}.bin',
          'fineweb-edu': hub + '/datasets/kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_{}.bin'}
questions = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
source = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'

def fetch(address, path, digest=''):
    """Download a file to path, unless it is there. What came before a break is kept and gone on
    from; only one of the right size (and SHA-256, if given) gets its name. Raises OSError."""
    if os.path.exists(path): return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = pathlib.Path(path + '.part')
    # of what is there one byte again: to ask for none would be an error
    have = max(0, part.stat().st_size - 1) if part.exists() else 0
    request = urllib.request.Request(address, headers={'Range': f'bytes={have}-'})
    try: response = urllib.request.urlopen(request, timeout=30)
    except OSError as error: raise OSError(f'{address}: {error}') from None
    with response, open(part, 'ab') as file:
        if response.status != 206: have = 0  # this server only sends all of it
        file.truncate(have)
        size, shown = have + (response.length or 0), 0
        while piece := response.read(2**20):
            have += file.write(piece)
            if time.time() > shown + 0.5 and sys.stdout.isatty():
                shown = time.time()
                print(f'\r{path}: {have / 1e6:.0f} of {size / 1e6:.0f} MB', end='', flush=True)
    if have < size:
        raise OSError(f'{address}: {have:,} of {size:,} bytes came; run it again to go on')
    if digest and hashlib.sha256(part.read_bytes()).hexdigest()[:16] != digest:
        part.unlink()
        raise OSError(f'{address} is damaged')
    os.replace(part, path)
    print(('\r' if shown else '') + f'{path}: {have / 1e6:,.1f} MB from {address}')
    return path

def split(text):
    """Words with the space before them, numbers, punctuation and spaces: no token crosses these.

    GPT-2's pattern, as near as the module re comes to it (it does not know \\p{L} and \\p{N})."""
    return re.findall(
        r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text)

def learn_bpe(text, size):
    """Byte-pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019): size tokens, as
    bytes. At first the 256 bytes; then, again and again, the most frequent pair becomes a token."""
    counts = collections.Counter(split(text))
    tokens = [bytes([i]) for i in range(256)]
    words = [list(word.encode()) for word in counts]  # as token ids, so far
    counts = list(counts.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)  # and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, -a, -b) for (a, b), count in pairs.items()]  # the most frequent comes first
    heapq.heapify(heap)
    while len(tokens) < size and heap:
        count, a, b = heapq.heappop(heap)
        best, changed = (-a, -b), set()
        if pairs[best] != -count: continue  # it has changed since, and stands there once more
        if pairs[best] < 2: break
        for i in where.pop(best):  # only these words change, and only their pairs' counts
            old, word, j = words[i], [], 0
            while j < len(old):
                found = tuple(old[j:j + 2]) == best
                word.append(len(tokens) if found else old[j])
                j += 2 if found else 1
            for pair in zip(old, old[1:]): pairs[pair] -= counts[i]
            for pair in zip(word, word[1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
            changed |= {*zip(old, old[1:]), *zip(word, word[1:])}
            words[i] = word
        for a, b in changed: heapq.heappush(heap, (-pairs[a, b], -a, -b))
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens

def vocabulary(tokens=None):
    """An encoder of these tokens (bytes, in the order in which they were merged), or GPT-2's."""
    if tokens is None:
        try: return tiktoken.get_encoding('gpt2')
        except OSError as error:
            sys.exit(f"the vocabulary of GPT-2 can't be had ({type(error).__name__}): set "
                     'TIKTOKEN_CACHE_DIR to a folder in which tiktoken once kept it')
    return tiktoken.Encoding(
        'learned', mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={'<|endoftext|>': len(tokens)},
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

def pieces(path, begin, end):
    """The UTF-8 text between two bytes of a file, a megabyte at a time."""
    utf8 = codecs.getincrementaldecoder('utf-8')()
    with open(path, 'rb') as file:
        file.seek(begin)
        while left := end - file.tell():
            piece = file.read(min(left, 2**20))
            piece += file.readline(end - file.tell())  # between lines no word is cut in two
            yield utf8.decode(piece)

def middle(path):
    """The byte of a UTF-8 text at which its last tenth begins, and its size."""
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        file.seek(begin := int(0.9 * size))  # 10xxxxxx would be within a character
        return begin + next((i for i, b in enumerate(file.read(4)) if b >> 6 != 2), 0), size

def read_shard(path):
    """A file of tokens, mapped: 256 int32 (20240520, version 1, how many), then uint16. (N,)"""
    header = np.fromfile(path, '<i4', 256)
    if header[:2].tolist() != [20240520, 1] or os.path.getsize(path) != 1024 + 2 * int(header[2]):
        raise ValueError(f'{path} is no whole shard of tokens; delete it to have it anew')
    return np.memmap(path, '<u2', 'r', 1024)

def write_shard(path, texts, encoding):
    """Texts as one shard of tokens, unless it is there; whole or not at all."""
    if os.path.exists(path): return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + '.tmp', 'wb') as file:
        file.write(bytes(1024))
        for text in texts: file.write(np.array(encoding.encode_ordinary(text), '<u2').tobytes())
        count = (file.tell() - 1024) // 2
        file.seek(0)
        file.write(struct.pack('<3i', 20240520, 1, count))
    os.replace(path + '.tmp', path)
    return path

def prepare(encoding):
    """The shards of the dataset: those to learn from and the one to be judged on."""
    if dataset in shards:
        names = ['val_000000'] + [f'train_{i:06}' for i in range(1, n_shards + 1)]
        paths = [fetch(shards[dataset].format(name), f'{cache_dir}/{dataset}/{name}.bin')
                 for name in names]
    elif os.path.isdir(dataset):
        paths = sorted(map(str, pathlib.Path(dataset).glob('*.bin')))
        paths.sort(key=lambda path: 'val' not in os.path.basename(path))
    else:
        begin, size = middle(dataset)
        about = f'{os.path.abspath(dataset)} {size} {os.path.getmtime(dataset)} {tokens}'
        stem = f'{cache_dir}/{hashlib.sha256(about.encode()).hexdigest()[:16]}-'
        paths = [write_shard(stem + 'val.bin', pieces(dataset, begin, size), encoding),
                 write_shard(stem + 'train.bin', pieces(dataset, 0, begin), encoding)]
    if len(paths) < 2: raise ValueError(f'{dataset} has {len(paths)} shards; 2 are needed')
    val, *train = map(read_shard, paths)
    return train, val

def get_windows(step):
    """The windows of a step, of all its micro-batches and processes: (windows, T + 1).

    They depend on seed and step only: so a resumed run gets the same, however many processes."""
    generator = np.random.default_rng((seed, step))
    sizes = np.array([len(shard) - block_size for shard in train_shards])
    start = generator.integers(sizes.sum(), size=total_batch_size // block_size)
    ends = sizes.cumsum()
    which = np.searchsorted(ends, start, side='right')  # in which shard, and where in it
    start -= (ends - sizes)[which]
    windows = np.empty((len(start), block_size + 1), np.int64)
    for i in set(which):
        windows[which == i] = train_shards[i][start[which == i, None] + np.arange(block_size + 1)]
    return torch.from_numpy(windows)

# ---------------------------------------------------------------- model
@dataclasses.dataclass
class GPTConfig:
    """The sizes of a GPT; by default those of GPT-2 with 124M parameters (Radford et al. 2019)."""
    block_size: int = 1024  # tokens it can look at
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

class Cache:
    """The keys and values of the tokens read so far, in all layers; room for block_size."""

    def __init__(self, config, B, like):
        shape = 2, B, config.n_head, config.block_size, config.n_embd // config.n_head
        self.kv = [torch.empty(shape, dtype=like.dtype, device=like.device)
                   for _ in range(config.n_layer)]
        self.length = 0  # GPT.hidden moves it, once all layers have appended

    def append(self, layer, k, v):
        """k and v of new tokens, (B, n_head, T, head_size) -> those of all tokens."""
        end = self.length + k.shape[2]
        keys, values = self.kv[layer]
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it what it needs (Vaswani et al. 2017)."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.layer, self.p = config.n_head, layer, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads found
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        """(B, T, n_embd) -> (B, T, n_embd); with a cache: T tokens, or one, after those in it"""
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
                   for z in self.c_attn(x).split(C, dim=2))
        if cache: k, v = cache.append(self.layer, k, v)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

class MLP(nn.Module):
    """What each position makes of it, on its own."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)  # wide
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)  # and back
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        # GPT-2 has GELU (Hendrycks & Gimpel 2016) in its form with tanh
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))

class Block(nn.Module):
    """Positions talk (attention), then think (MLP)."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config, layer)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, cache=None):
        """(B, T, n_embd) -> (B, T, n_embd)"""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # which token it is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)  # the final norm
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # one table reads and writes (Press & Wolf 2017)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what is added to the residual stream is smaller, the more there is
                added = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer)**0.5 if added else 0.02)
            elif name.endswith('bias'): nn.init.zeros_(p)

    def hidden(self, idx, cache=None):
        """Token ids (B, T) -> (B, T, n_embd), what the head makes logits of."""
        past = cache.length if cache else 0
        x = self.drop(self.wte(idx) + self.wpe.weight[past:past + idx.shape[1]])
        for block in self.h: x = block(x, cache)
        if cache: cache.length += idx.shape[1]
        return self.ln_f(x)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss."""
        logits = self.lm_head(self.hidden(idx)).float()
        if targets is None: return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None,
                 on_token=None):
        """idx (B, T) -> (B, T + max_new_tokens), sampled; on_token sees each one (B, 1) at once.

        From the top_k likeliest tokens, and of these from as many as together have the chance
        top_p (Holtzman et al. 2020). It ends early when all rows have come to the token stop."""
        size, x = self.config.block_size, idx[:, -self.config.block_size:]
        cache, done = Cache(self.config, len(idx), self.wte.weight), torch.zeros_like(idx[:, :1])
        for _ in range(max_new_tokens):
            if cache.length + x.shape[1] > size:  # full: read the last half of the window again
                cache.length, x = 0, idx[:, -((size + 1) // 2):]
            logits = self.lm_head(self.hidden(x, cache)[:, -1]).float() / temperature  # (B, vocab)
            if top_k > 0:  # the rest becomes impossible
                logits[logits < logits.topk(min(top_k, logits.shape[1])).values[:, -1:]] = -math.inf
            if top_p < 1:
                chance, order = F.softmax(logits, dim=-1).sort(descending=True)
                unlikely = chance.cumsum(dim=-1) - chance >= top_p  # what is before is enough
                logits[unlikely.scatter(1, order, unlikely)] = -math.inf
            x = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)  # (B, 1)
            if stop is not None:
                x = torch.where(done > 0, stop, x)
                done = (x == stop).long()
            idx = torch.cat((idx, x), dim=1)
            if on_token: on_token(x)
            if stop is not None and done.all(): break
        return idx

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """A GPT with the weights of 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl', which are
        downloaded once, or of a .safetensors file or a folder with one, in the names and layout of
        OpenAI's GPT-2. Raises OSError, or ValueError where the file is not just that."""
        path = name
        if name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
            path = fetch(weights.format(name), f'{cache_dir}/{name}/model.safetensors')
        elif os.path.isdir(name): path = os.path.join(name, 'model.safetensors')
        shapes = {tensor: shape for tensor, shape, _ in read_safetensors(path)}
        if not {'wte.weight', 'wpe.weight'} <= {*shapes}: raise ValueError(f'{path} has no GPT-2')
        (vocab_size, n_embd), block_size = shapes['wte.weight'], shapes['wpe.weight'][0]
        n_layer = sum(tensor.endswith('.ln_1.weight') for tensor in shapes)
        beside, n_head = pathlib.Path(path).with_name('config.json'), n_embd // 64  # OpenAI's heads
        if beside.exists(): n_head = json.loads(beside.read_text())['n_head']
        with torch.device('meta'):  # without memory: each number is to be written just once
            model = cls(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout))
        model.to_empty(device='cpu')
        model.lm_head.weight = model.wte.weight  # they were torn apart
        left, wrong = dict(model.named_parameters()), []
        for tensor, shape, read in read_safetensors(path):
            turned = tensor.endswith(TURNED)
            if tensor not in left: wrong.append(f'{tensor} is too much')
            elif left[tensor].shape != (shape[::-1] if turned else shape):
                wrong.append(f'{tensor} is of shape {tuple(shape)}')
            else: left.pop(tensor).data.copy_(read().t() if turned else read())
        if wrong or left:
            raise ValueError(f'{path}: ' + ', '.join(wrong + [f'{t} is missing' for t in left]))
        return model

    def save_pretrained(self, folder):
        """Write model.safetensors and config.json, which transformers loads as GPT2LMHeadModel."""
        c, header, size = self.config, {'__metadata__': {'format': 'pt'}}, 0
        for name, p in self.named_parameters():
            shape = [*p.shape][::-1 if name.endswith(TURNED) else 1]
            header[name] = {'dtype': 'F32', 'shape': shape,
                            'data_offsets': [size, size := size + 4 * p.numel()]}
        head = json.dumps(header).encode()
        head += b' ' * (-len(head) % 8)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, 'model.safetensors')
        with open(path + '.tmp', 'wb') as file:
            file.write(struct.pack('<Q', len(head)) + head)
            for name, p in self.named_parameters():
                p = p.detach().float().cpu()
                (p.t() if name.endswith(TURNED) else p).contiguous().numpy().tofile(file)
        os.replace(path + '.tmp', path)
        config = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'n_layer': c.n_layer,
                  'n_head': c.n_head, 'n_embd': c.n_embd, 'n_positions': c.block_size,
                  'vocab_size': c.vocab_size, 'activation_function': 'gelu_new',
                  'bos_token_id': c.vocab_size - 1, 'eos_token_id': c.vocab_size - 1}
        pathlib.Path(folder, 'config.json').write_text(json.dumps(config, indent=2) + '\n')

# OpenAI's matrices are stored as (in, out), nn.Linear's are (out, in)
TURNED = 'attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight'

def read_safetensors(path):
    """(name, shape, a function that reads the tensor) for each tensor in a .safetensors file.

    The format: the length of the header as a u64, the header as JSON, the numbers. Each tensor is
    mapped from the file and let go again, so that not all of them are in memory. The prefix
    'transformer.', masks and a copy of wte for the head are left out. Raises ValueError."""
    kinds = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        try: header = json.loads(file.read(min(length, size)))
        except ValueError: raise ValueError(f'{path} is damaged, or no .safetensors file') from None
    for name, info in header.items():
        name = name.removeprefix('transformer.')
        if name.endswith(('__metadata__', 'lm_head.weight', '.attn.bias', '.attn.masked_bias')):
            continue
        begin, end = (8 + length + offset for offset in info['data_offsets'])
        if end > size: raise ValueError(f'{path} is {end - size:,} bytes too short')
        if info['dtype'] not in kinds: raise ValueError(f"{name} is of type {info['dtype']}")
        raw = lambda b=begin, e=end: np.memmap(path, np.uint8, 'c', b, (e - b,))
        yield name, torch.Size(info['shape']), lambda raw=raw, info=info: torch.frombuffer(
            raw(), dtype=kinds[info['dtype']]).view(info['shape'])

# ---------------------------------------------------------------- training
# operations per second by the data sheets, dense, in bfloat16 (T4 and V100: float16; H100 as SXM)
PEAKS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L4': 121e12, 'T4': 65e12, 'V100': 125e12}

def over_ranks(number):
    """The sum of a number over all processes."""
    if world == 1: return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()

@torch.no_grad()
def evaluate():
    """Mean loss over the validation split, nats per token; nothing random."""
    model.eval()
    tokens = torch.from_numpy(val_shard[:eval_tokens + 1].astype(np.int64))
    count = len(tokens) - 1  # every token but the first is predicted, once
    pad = (0, -count % block_size)  # fills the last window; a target of -1 is not scored
    x = F.pad(tokens[:-1], pad).view(-1, block_size)[rank::world].split(batch_size)
    y = F.pad(tokens[1:], pad, value=-1).view(-1, block_size)[rank::world].split(batch_size)
    with autocast:
        total = sum(model(xb.to(device), yb.to(device))[1].item() * (yb >= 0).sum().item()
                    for xb, yb in zip(x, y) if len(xb))
    model.train()
    return over_ranks(total) / count

def bits_per_byte(loss):
    """Nats per token -> bits per byte of text, which can be compared between vocabularies."""
    length = np.array([len(token) for token in map(
        encoding.decode_single_token_bytes, range(encoding.max_token_value))] + [0])
    scored = val_shard[1:eval_tokens + 1]  # <|endoftext|>, the last token, is no text
    return loss / math.log(2) * len(scored) / length[scored].sum()

def accumulate(windows):
    """Forward and backward over this process's share of a step's windows; their mean loss."""
    total, parts = 0.0, windows[rank::world].split(batch_size)
    for i, part in enumerate(parts):
        part = part.to(device)
        if world > 1: train_model.require_backward_grad_sync = i == len(parts) - 1
        with autocast: _, loss = train_model(part[:, :-1], part[:, 1:])
        scaler.scale(loss / len(parts)).backward()
        total += loss.item() / len(parts)
    return over_ranks(total) / world

@torch.no_grad()
def score_hellaswag():
    """HellaSwag (Zellers et al. 2019): which of four endings goes on from a text? The share that is
    right if the likeliest is chosen, by the sum of its tokens' losses, and by their mean."""
    model.eval()
    path = fetch(questions, f'{cache_dir}/hellaswag_val.jsonl')
    rows = []
    for line in pathlib.Path(path).read_text(encoding='utf-8').splitlines()[:hellaswag_limit]:
        row = json.loads(line)
        start = encoding.encode_ordinary(row['ctx'])
        ends = [encoding.encode_ordinary(' ' + ending) for ending in row['endings']]
        rows.append((row['label'], [(start + end)[-config.block_size - 1:] for end in ends],
                     [len(end) for end in ends]))
    count, rows = len(rows), sorted(rows, key=lambda row: max(map(len, row[1])))[rank::world]
    right = np.zeros(2)
    for i in range(0, len(rows), 8):  # rows of similar length, so that there is little padding
        labels, texts, sizes = zip(*rows[i:i + 8])
        texts, sizes = sum(texts, []), torch.tensor(sizes).view(-1, 1).to(device)
        longest = max(map(len, texts))
        idx = torch.tensor([text + [0] * (longest - len(text)) for text in texts]).to(device)
        ends = torch.tensor([len(text) for text in texts]).view(-1, 1).to(device)
        with autocast: logits = model(idx[:, :-1])[0]
        loss = F.cross_entropy(logits.transpose(1, 2), idx[:, 1:], reduction='none')  # (4 rows, T)
        at = torch.arange(1, longest, device=device)
        loss = (loss * ((at >= ends - sizes) & (at < ends))).sum(dim=1)
        for k, score in enumerate((loss, loss / sizes[:, 0])):
            right[k] += (score.view(-1, 4).argmin(dim=1).cpu() == torch.tensor(labels)).sum().item()
    return [over_ranks(r) / count for r in right]

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

if __name__ == '__main__':
    if rank: sys.stdout = open(os.devnull, 'w')  # one process speaks for all
    # on a CPU the fused attention is slower in training than its steps one by one
    torch.backends.cuda.enable_flash_sdp(device != 'cpu')
    if world > 1:
        if device == 'cuda': torch.cuda.set_device(device := f"cuda:{os.environ['LOCAL_RANK']}")
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')

    # bfloat16 halves the traffic and, where the processor has it, the time of a product
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
    autocast = torch.autocast(device.split(':')[0], getattr(torch, dtype),
                              enabled=dtype != 'float32')
    print(f'device {device}: PyTorch finds {gpus} here; {dtype}: {why}')

    torch.manual_seed(seed + rank)  # so that each has dropout of its own; all get rank 0's weights
    tokens, saved, ready = None, None, dataset in shards or os.path.isdir(dataset)
    try:
        if dataset == 'input.txt' and max_iters and not os.path.exists(dataset):
            try: fetch(source, os.path.abspath(dataset), '86c4e6aa9db7c042')
            except OSError as error:
                sys.exit(f'{error}; put a text of your own, in UTF-8, into input.txt in this '
                         'folder')
        if init_from == 'resume':
            saved = torch.load(checkpoint, map_location=device, weights_only=True)
            if saved['must_fit']['script'] != 'gpt2.py': raise ValueError("it is another script's")
            config, tokens = GPTConfig(**saved['must_fit']['config']), saved['must_fit']['tokens']
            model = GPT(config)
            for name in ('n_layer', 'n_head', 'n_embd'):
                made = getattr(config, name)
                if f'--{name}=' in ' '.join(sys.argv) and globals()[name] != made:
                    raise ValueError(f'{checkpoint} was made with {name}={made}')
        elif init_from == 'scratch':
            if not ready:  # a vocabulary made for this text, from its first megabytes
                text = ''.join(pieces(dataset, 0, min(10_000_000, middle(dataset)[0])))
                tokens = [t.decode('latin-1') for t in learn_bpe(text, vocab_size - 1)]
            config = GPTConfig(block_size, len(tokens) + 1 if tokens else 50257, n_layer, n_head,
                               n_embd, dropout)
            model = GPT(config)
        else:
            model = GPT.from_pretrained(init_from, dropout)
            config, beside = model.config, pathlib.Path(init_from, 'tokens.json')
            if beside.exists(): tokens = json.loads(beside.read_text())
        block_size = min(block_size, config.block_size)
        encoding = vocabulary([t.encode('latin-1') for t in tokens] if tokens else None)
        if encoding.n_vocab != config.vocab_size:
            raise ValueError(f'weights for {config.vocab_size} tokens, a vocabulary of '
                             f'{encoding.n_vocab}')
        if max_iters:
            if rank: dist.barrier()  # the first process downloads and tokenizes, for all
            train_shards, val_shard = prepare(encoding)
            if world > 1 and not rank: dist.barrier()
            if min(map(len, [val_shard, *train_shards])) < block_size + 2:
                raise ValueError(f'{dataset} is too short')
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, http.client.HTTPException,
            pickle.UnpicklingError, EOFError) as error:  # a damaged file fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        sys.exit(f'init_from={init_from}, dataset={dataset}: {reason}')
    model.to(device)
    at_once = batch_size * block_size * world
    if max_iters and total_batch_size % at_once:
        sys.exit(f'total_batch_size={total_batch_size} does not divide by batch_size * block_size '
                 f'* processes = {at_once}: {max(1, total_batch_size // at_once) * at_once} does')
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # no pull towards zero for these
    optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                                   {'params': vectors, 'weight_decay': 0.0}],
                                  betas=(0.9, beta2), fused=True)
    scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')
    step, losses, val_losses, seconds, best = 0, [], [], 0.0, model.state_dict()
    must_fit = {'script': 'gpt2.py', 'config': dataclasses.asdict(config), 'tokens': tokens}
    parameters = sum(p.numel() for p in model.parameters())
    print(f'{init_from}: {parameters:,} parameters, {config.vocab_size:,} tokens, {config}')
    if saved:
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        torch.set_rng_state(saved['random'].cpu())
        step, losses, val_losses, seconds, best = (
            saved[name] for name in ('step', 'losses', 'val_losses', 'seconds', 'best'))
        print(f'resumed from {checkpoint} after step {step}')
    if max_iters:
        print(f'{dataset}: {sum(map(len, train_shards)):,} tokens to learn from, '
              f'{len(val_shard):,} to be judged on; a step: {total_batch_size // at_once} times '
              f'{batch_size} windows of {block_size} on {world} devices')

    train_model = model
    if use_compile:
        try:
            torch.compile(torch.neg)(torch.ones(1, device=device))  # fails with no compiler
            train_model = torch.compile(model)
        except Exception as error:
            print(f'use_compile: not here, so without it ({error})'.splitlines()[0])
    if world > 1:
        train_model = nn.parallel.DistributedDataParallel(
            train_model, device_ids=[device] if device.startswith('cuda') else None)
    interrupts = []  # Ctrl-C makes the step at hand the last one
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    clear = '\r' + ' ' * 79 + '\r' if sys.stdout.isatty() else ''  # a file gets no progress line
    start, shown, first = time.time() - seconds, 0.0, step + 1
    for step in range(first, max_iters + 1):
        lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # a quarter of a cosine
        lr *= min(1, step / warmup_iters)
        for group in optimizer.param_groups: group['lr'] = lr
        while True:
            try:
                optimizer.zero_grad()
                losses.append(accumulate(get_windows(step)))
                break
            except torch.OutOfMemoryError:  # half as many windows at once give the same gradient
                if batch_size == 1 or world > 1: sys.exit('out of memory: take a lower batch_size')
                batch_size //= 2
                print(f'{clear}out of memory: so now it is batch_size={batch_size}')
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        last = step == max_iters or over_ranks(len(interrupts)) > 0
        val_loss = evaluate() if step % eval_interval == 0 or last else None
        if not math.isfinite(losses[-1] + (val_loss or 0)):  # before it can reach the checkpoint
            sys.exit(f'{clear}step {step}: the loss is not finite: try a lower learning_rate than '
                     f'{learning_rate}; {checkpoint} is as it was')
        seconds = time.time() - start
        speed = step * total_batch_size / seconds  # tokens per second
        if val_loss is not None:
            val_losses.append((val_loss, step))
            best_loss, best_step = min(val_losses)
            loss = sum(losses[-100:]) / len(losses[-100:])  # of the last hundred steps
            print(f'{clear}step {step:4}: train loss {loss:.4f}, val loss {val_loss:.4f}, '
                  f'{seconds:.1f} s', flush=True)
            if best_step == step:
                best = {name: t.clone() for name, t in model.state_dict().items()}
            if rank == 0 and (best_step == step or last): save()
            if last: break
        elif clear and seconds > shown + 0.2:
            shown = seconds
            print(f'{clear}step {step}/{max_iters}, loss {losses[-1]:.4f}, {speed:,.0f} tokens/s, '
                  f'{seconds / step * (max_iters - step):.0f} s left', end='', flush=True)
    if first <= max_iters:
        plot()
        print(f'best val loss {best_loss:.4f} (step {best_step}), perplexity '
              f'{torch.tensor(best_loss).exp():.2f}, {bits_per_byte(best_loss):.4f} bits per byte, '
              f'{seconds:.1f} s, {speed:,.0f} tokens/s')
        if peak := next((peak for gpu, peak in PEAKS.items() if device.startswith('cuda')
                         and re.search(rf'\b{gpu}\b', torch.cuda.get_device_name(device))), None):
            # 6 operations for each parameter, and attention's (Chowdhery et al. 2022, appendix B)
            work = 6 * parameters + 12 * config.n_layer * config.n_embd * block_size
            print(f'{speed / world * work / peak:.1%} of what the GPU could do (MFU)')
    model.load_state_dict(best)
    model.eval()
    if hellaswag:
        try: scores = score_hellaswag()
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            sys.exit(f'hellaswag: {error}')
        print(f'HellaSwag: {scores[0]:.4f} by sum, {scores[1]:.4f} by mean (chance 0.25; GPT-2 '
              'with 124M parameters 0.2859 and 0.2955, XL 0.3842 and 0.4893)')
    if export and rank == 0:
        try:
            model.save_pretrained(export)
            if tokens: pathlib.Path(export, 'tokens.json').write_text(json.dumps(tokens))
        except OSError as error: sys.exit(f'export={export}: {error}')
        print(f'{export}: model.safetensors and config.json')
    if world > 1: dist.destroy_process_group()

# ---------------------------------------------------------------- sampling
if __name__ == '__main__' and rank == 0:
    signal.signal(signal.SIGINT, lambda *_: sys.exit())  # all is saved: Ctrl-C just ends the sample
    torch.backends.cuda.enable_flash_sdp(True)
    # one token at a time: what takes the time is reading all weights, and half the bytes are read
    # sooner. On a CPU the type that is best for matrices need not be the best for one row
    if device == 'cpu' and why != 'as set':
        dtype = min(('float32', 'bfloat16', 'float16'), key=row_milliseconds)
        print(f'writing in {dtype}, in which one row times a matrix is the fastest here')
    model.to(getattr(torch, dtype))
    end = encoding.eot_token
    idx = torch.tensor([encoding.encode_ordinary(prompt or '\n' * bool(tokens)) or [end]])
    utf8 = codecs.getincrementaldecoder('utf-8')('replace')  # holds pieces of a character back

    def show(token):
        if token.item() == end: return
        print(utf8.decode(encoding.decode_single_token_bytes(token.item())), end='', flush=True)

    print('-' * 64 + '\n' + prompt, end='')
    model.generate(idx.to(device), max_new_tokens, temperature, top_k, top_p, end, show)
    print(utf8.decode(b'', final=True))
