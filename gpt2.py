# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "tiktoken"]
# ///
r"""GPT-2 itself: its vocabulary, its weights, its training, its scores.

    python gpt2.py             train a small GPT-2 on input.txt, then write a sample
    python gpt2.py --resume    continue (repeat the other settings, too)
    python gpt2.py --init_from=gpt2 --max_iters=0 --prompt="The meaning of life is"
                               write with OpenAI's weights

On 2 cores of an AMD EPYC the first command trains for 49 s (85 s in float32 with AVX2, as on
most Intel laptops) and reaches 2.114 bits per byte of input.txt (gpt.py: 2.336). With a CUDA GPU
it trains a larger model.

A model of the size of OpenAI's smallest, trained from scratch by eight GPUs on 10 billion tokens
of web text (20 GB; never run by us):

    torchrun --standalone --nproc_per_node=8 gpt2.py --dataset=fineweb-edu --n_shards=99 \
        --n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=16 \
        --total_batch_size=524288 --max_iters=19073 --learning_rate=6e-4 \
        --warmup_ratio=0.0367 --weight_decay=0.1 --beta2=0.95 --dropout=0 \
        --init_gain=0.55 --c_proj_gain=0.15 --use_compile

In your own program (idx has the shape (B, T), each token (B, 1)):

    import tiktoken, torch
    from gpt2 import GPT
    model, encoding = GPT.from_pretrained('gpt2'), tiktoken.get_encoding('gpt2')
    idx = torch.tensor([encoding.encode('The meaning of life is')])
    for token in model.generate(idx, 20):
        print(encoding.decode(token[0].tolist()), end='')

New since gpt.py: tokens of several bytes, learned from the text, or GPT-2's; biases and the tanh
GELU; FlashAttention, a key/value cache, epochs (as in modern_gpt.py); weights in the safetensors
format; web text in shards; gradients summed over micro-batches and processes; top-p sampling;
bits per byte and HellaSwag.
"""
import codecs, collections, dataclasses, datetime, glob, itertools, json, math, os, re, signal
import socket, sys, time, urllib.request, zlib
import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

# ------------------------------------------------------------------ hyperparameters
# 'mps' works on a Mac, too; but on an M1 or M2 with torch 2.7 to 2.13 a matrix product over
# 32,767 or more terms is wrong (PyTorch issue 193487): no training with GPT-2's 50,257 tokens
device = 'cuda' if torch.cuda.is_available() else 'cpu'
if '--device=cpu' in sys.argv:  # the sizes below depend on the device
    device = 'cpu'
# some constants have two values: for a CUDA GPU, and for a laptop
seed = 1337  # same seed + same settings = same model
# weights to start from: '' (random), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
# with model.safetensors and config.json; their sizes replace those below, except that
# --block_size can shorten the context
init_from = ''
dataset = 'input.txt'  # a text file, 'fineweb', 'fineweb-edu', or a folder of token shards
n_shards = 1  # shards of fineweb or fineweb-edu to train on, 100 million tokens each
vocab_size = 2048  # size of a learned vocabulary
total_batch_size = 16384 if device == 'cuda' else 2048  # tokens per optimizer step
batch_size = 64 if device == 'cuda' else 32  # sequences at once per process (micro-batch)
block_size = 256 if device == 'cuda' else 64  # context length, in tokens
n_layer = 6 if device == 'cuda' else 2  # blocks
n_head = 6 if device == 'cuda' else 4  # attention heads per block
n_embd = 384 if device == 'cuda' else 128  # width of the residual stream
dropout = 0.2 if device == 'cuda' else 0.0  # fraction of activations dropped during training
init_gain = 0.8  # initial matrices have standard deviation init_gain / sqrt(columns)
c_proj_gain = 0.3  # likewise for c_proj layers, which write to the residual stream
max_iters = 2000 if device == 'cuda' else 1200  # training steps
learning_rate = 1e-3 if device == 'cuda' else 4e-3  # peak learning rate (tuned for the CPU)
warmup_ratio = 0.08  # fraction of the steps over which the learning rate rises
weight_decay = 0.5  # pulls matrices toward 0
beta2 = 0.99  # AdamW averages squared gradients over 1 / (1 - beta2) steps
grad_clip = 1.0  # clip the gradient norm at this value (0 = do not)
use_compile = False  # torch.compile; needs a C++ compiler
eval_interval = 500  # evaluate every this many steps
checkpoint = 'gpt2.pt'  # checkpoint file, written at every evaluation
resume = False  # continue from the checkpoint, with its sizes
cache_dir = '~/.cache/gpt2.py'  # folder for weights, shards and HellaSwag
export = ''  # folder to write model.safetensors and config.json to
hellaswag = 0  # score on this many of HellaSwag's 10,042 questions (0 = none)
prompt = '\n'  # text to continue
temperature = 0.8  # below 1: safer; above 1: more surprising
top_k = 200  # sample from the k most likely tokens (0 = all, 1 = greedy)
top_p = 0.95  # nucleus sampling: keep the top tokens with this total probability
max_new_tokens = 200  # tokens to write
int8 = False  # round the weights to 8 bits before the sample: faster (CPU only)

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
world_size = int(os.environ.get('WORLD_SIZE', 1))  # number of processes, set by torchrun
rank = int(os.environ.get('RANK', 0)) if world_size > 1 else 0  # index of this process
if device == 'cuda' and world_size > 1:
    device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'  # one GPU per process
# mixed precision: matrix products in dtype; softmax, LayerNorm and the loss in float32
device_type = torch.device(device).type  # 'cuda:1' -> 'cuda'
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')

# ------------------------------------------------------------------ vocabulary
# A text is first split into words (with the space before them), numbers, punctuation and
# white space; no token crosses a split. This is close to GPT-2's pattern; Python and
# tiktoken read it alike, and its limit of 32 characters keeps texts without spaces fast.
marks = r'!-/:-@\[-`{-~¡-¿‐-⁞、-〟'  # punctuation and symbols
pattern = (rf"'(?:[sdmt]|ll|ve|re)| ?[^\s\d{marks}]{{1,32}}| ?\d{{1,32}}| ?[{marks}]{{1,32}}"
           r"|\s+(?!\S)|\s+")

def merge(word, pair, new):
    """The word (a list of tokens) with each occurrence of the pair replaced by new."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged

def learn_bpe(text, size):
    """Byte-pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019).

    Tokens 0 to 255 are the bytes. The most frequent pair of neighbors becomes token 256,
    and so on, up to size tokens. Returns the merged pairs, in order."""
    frequency = collections.Counter(re.findall(pattern, text))  # of each word
    words = [list(word.encode()) for word in frequency]  # as lists of tokens
    counts = list(frequency.values())
    pairs = collections.Counter()  # how often each pair occurs
    words_with = collections.defaultdict(set)  # indices of the words that contain a pair
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            words_with[pair].add(i)
    merges = []
    while len(merges) < size - 256 and pairs:
        best = max(pairs, key=pairs.get)
        if pairs[best] < 2:
            break  # no pair occurs twice
        for i in words_with.pop(best):  # only these words change
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] -= counts[i]
            words[i] = merge(words[i], best, 256 + len(merges))
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += counts[i]
                words_with[pair].add(i)
        del pairs[best]
        merges.append(best)
    return merges

def make_encoding(merges):
    """A tiktoken encoding: from learned merges, or GPT-2's if merges is None."""
    if merges is None:
        return tiktoken.get_encoding('gpt2')
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding('learned', pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': len(tokens)})

# ------------------------------------------------------------------ data
# A text, or web text in shards: files of 256 int32 (20240520, 1, number of tokens, zeros) and
# the tokens as uint16, in GPT-2's vocabulary.
hub = 'https://huggingface.co/datasets/kjj0/'
web = {'fineweb': hub + 'fineweb10B-gpt2/resolve/main/fineweb_',  # Penedo et al. 2024
       'fineweb-edu': hub + 'finewebedu10B-gpt2/resolve/main/finewebedu_'}
is_text = dataset not in web and not os.path.isdir(dataset)

def fetch(url, path):
    """Download a file unless it exists. One process downloads, the others wait."""
    if rank == 0 and not os.path.exists(path):
        print('downloading', url, 'to', path)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        socket.setdefaulttimeout(30)  # give up after 30 s without data
        urllib.request.urlretrieve(url, path + '.tmp')  # fails if cut short
        socket.setdefaulttimeout(None)
        os.replace(path + '.tmp', path)
    if world_size > 1 and dist.is_initialized():
        dist.barrier()

def read_text():
    """The text to train on, and its last tenth (at most a million characters) to validate on."""
    if dataset == 'input.txt':  # if missing, Tiny Shakespeare (Karpathy 2015) is downloaded
        assert not resume or os.path.exists(dataset), (
            f'put the input.txt that {checkpoint} was trained on into this folder')
        fetch('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
              'input.txt', dataset)
    with open(dataset, encoding='utf-8-sig') as file:
        text = file.read()
    n = max(int(0.9 * len(text)), len(text) - 1_000_000)
    return text[:n], text[n:]

def read_shard(path):
    """The tokens of a shard, an array (N,) mapped into memory."""
    header = np.fromfile(path, '<i4', count=256)
    size = os.path.getsize(path)
    is_whole = size > 1024 and header[0] == 20240520 and size == 1024 + 2 * int(header[2])
    assert is_whole, f'{path}: not a whole shard (int32 20240520, 1, n, ...; n uint16)'
    return np.memmap(path, '<u2', 'r', offset=1024)

def read_tokens(encoding):
    """The tokens to train on, a list of arrays (one for a text, one for each shard), and an
    array to validate on. Shards can be the *.bin files of a folder, one with val in its name."""
    if is_text:
        train, val = [np.array(encoding.encode_ordinary(text)) for text in read_text()]
        return [train], val
    paths = sorted(glob.glob(f'{glob.escape(dataset)}/*.bin'))
    if dataset in web:
        folder = os.path.expanduser(f'{cache_dir}/{dataset}')
        names = ['val_000000'] + [f'train_{i:06}' for i in range(1, n_shards + 1)]
        paths = [f'{folder}/{name}.bin' for name in names]
        for name, path in zip(names, paths):
            fetch(f'{web[dataset]}{name}.bin', path)
    train = [read_shard(path) for path in paths if 'val' not in os.path.basename(path)]
    val = [read_shard(path) for path in paths if 'val' in os.path.basename(path)]
    assert train and len(val) == 1, (
        f'{dataset}: needs shards (*.bin), one of them with val in its name')
    return train, val[0][:10_000_000]  # enough for a precise loss

def sequences(shards):
    """Yield sequences of block_size + 1 tokens, without end, in the same order in every process.

    Each epoch cuts the shards at new offsets and shuffles the pieces of each."""
    for epoch in itertools.count():
        rng = torch.Generator().manual_seed(seed * 10**6 + epoch)
        for shard in shards:
            offset = torch.randint(block_size, (1,), generator=rng).item()
            n = (len(shard) - 1 - offset) // block_size
            for i in torch.randperm(n, generator=rng).tolist():
                first = offset + i * block_size
                yield shard[first:first + block_size + 1]

def get_batch(source):
    """This process's share x (total_batch_size / block_size / world_size, T) of the next
    sequences of the source; y is x shifted by one token."""
    batch = list(itertools.islice(source, total_batch_size // block_size))
    xy = torch.from_numpy(np.stack(batch[rank::world_size]).astype(np.int64)).to(device)
    return xy[:, :-1], xy[:, 1:]

# ------------------------------------------------------------------ weights
# The safetensors format: length of the header (8 bytes), header (JSON: type, shape and
# byte range of each tensor), numbers. GPT-2's files hold these matrices as (inputs, outputs):
transposed = 'c_attn.weight', 'c_proj.weight', 'c_fc.weight'

def read_safetensors(path):
    """Yield (name, tensor) for each tensor of a file, mapped into memory."""
    dtypes = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
              'U8': torch.uint8, 'BOOL': torch.bool}  # the last two: causal masks
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        start = 8 + int.from_bytes(file.read(8), 'little')
        assert start < size, f'{path} is not a safetensors file'
        header = json.loads(file.read(start - 8))
    header.pop('__metadata__', None)
    end = start + max(info['data_offsets'][1] for info in header.values())
    assert size == end, f'{path} has {size:,} bytes instead of {end:,}'
    for name, info in header.items():
        first, last = info['data_offsets']
        # 'c': copy on write, as torch wants writable memory
        data = np.memmap(path, np.uint8, 'c', offset=start + first, shape=last - first)
        tensor = torch.from_numpy(data).view(dtypes[info['dtype']])
        yield name, tensor.view(info['shape'])

# ------------------------------------------------------------------ model
# GPT-2 (Radford et al. 2019), down to its names, its biases and its tanh GELU.
@dataclasses.dataclass
class GPTConfig:
    """The sizes of a GPT; by default those of GPT-2 with 124M parameters."""
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

class CausalSelfAttention(nn.Module):
    """Each position gathers what it needs from itself and the positions before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes the heads
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        head_size = C // self.n_head
        # query: what am I looking for? key: what do I contain? value: what do I pass on?
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, head_size).transpose(1, 2)
        v = v.view(B, T, self.n_head, head_size).transpose(1, 2)
        if cache:  # reuse the keys and values of earlier positions
            if self in cache:
                k = torch.cat((cache[self][0], k), dim=2)
                v = torch.cat((cache[self][1], v), dim=2)
            cache[self] = k, v
        p = self.dropout if self.training else 0.0
        # softmax(q k / sqrt(head_size)) v in one kernel (Dao et al. 2022);
        # after the prompt T is 1: no future to mask
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

class MLP(nn.Module):
    """Each position processes, on its own, what it has gathered."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))

class Block(nn.Module):
    """Communicate, then compute. Both add to x, the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x

class GPT(nn.Module):
    """Embeddings, a stack of blocks, and a head that scores every possible next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # which token it is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # its position
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # shared weights (Press & Wolf 2017)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                gain = c_proj_gain if 'c_proj' in name else init_gain
                nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)  # 0.02 in GPT-2 (gain 0.55)
            elif 'bias' in name:
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean loss.

        With a cache, the first call reads the prompt, each later call one token. Only the last
        position's logits come back."""
        T = idx.shape[1]
        past = cache['length'] if cache else 0  # positions read earlier
        x = self.wte(idx[:, past:]) + self.wpe.weight[past:T]  # (B, T - past, n_embd)
        x = self.drop(x)
        for block in self.h:
            x = block(x, cache)
        if cache:
            cache['length'] = T
            x = x[:, -1:]
        logits = self.lm_head(self.ln_f(x)).float()  # the loss in float32
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0):
        """Continue idx (B, T), yielding one new token (B, 1) at a time."""
        idx = idx[:, -self.config.block_size:]
        cache = {'length': 0}  # how many positions are cached; each layer adds keys and values
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.block_size:  # the cache is full: reread the last half
                idx = idx[:, -max(1, self.config.block_size // 2):]
                cache = {'length': 0}
            logits, _ = self(idx, cache=cache)
            logits = logits[:, -1] / temperature  # (B, vocab_size), of the last position
            n = min(top_k, logits.shape[1]) if top_k > 0 else logits.shape[1]
            logits, tokens = logits.topk(n)  # likeliest first
            if top_p < 1:  # keep the fewest that reach top_p together (Holtzman et al. 2020)
                probs = F.softmax(logits, dim=-1)
                logits[probs.cumsum(dim=-1) - probs >= top_p] = -math.inf
            choice = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            token = tokens.gather(1, choice)
            idx = torch.cat((idx, token), dim=1)
            yield token

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """Load OpenAI's 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' (downloaded once), or
        a folder that save_pretrained or transformers has written.

        Raises an error if a tensor is missing, unexpected, or has the wrong shape."""
        folder = os.path.expanduser(name)
        names = ['gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl']
        if name in names and not os.path.isdir(name):
            folder = os.path.expanduser(f'{cache_dir}/{name}')
            for part in 'config.json', 'model.safetensors':
                url = f'https://huggingface.co/openai-community/{name}/resolve/main/{part}'
                fetch(url, f'{folder}/{part}')
        path = f'{folder}/model.safetensors'
        assert os.path.exists(path), (
            f'no file {path}; init_from: {", ".join(names)}, or a folder '
            'with config.json and model.safetensors (all weights in one file)')
        with open(f'{folder}/config.json', encoding='utf-8') as file:
            stored = json.load(file)
        usual = dict(activation_function='gelu_new', layer_norm_epsilon=1e-5,
                     scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        for key, value in usual.items():  # otherwise it is another architecture
            assert stored.get(key, value) == value, f'{folder}/config.json: {key} is not {value}'
        vocab_size = stored['vocab_size']
        learned = os.path.exists(f'{folder}/merges.json')
        if 50257 < vocab_size <= 50432 and not learned:  # GPT-2's, padded for speed
            vocab_size = 50257
        config = GPTConfig(stored['n_positions'], vocab_size, stored['n_layer'],
                           stored['n_head'], stored['n_embd'], dropout)
        state = {}
        for key, tensor in read_safetensors(path):
            key = key.removeprefix('transformer.')
            if key.endswith(('.attn.bias', '.attn.masked_bias')):
                continue  # causal masks
            if key.endswith(transposed):
                tensor = tensor.t()
            if key in ('wte.weight', 'lm_head.weight'):
                tensor = tensor[:vocab_size]
            state[key] = tensor.float().clone(memory_format=torch.contiguous_format)
        head = state.setdefault('lm_head.weight', state['wte.weight'])
        assert torch.equal(head, state['wte.weight']), f'{path}: lm_head and wte differ'
        with torch.device('meta'):  # its memory comes from the tensors loaded above
            model = cls(config)
        model.load_state_dict(state, assign=True)
        model.lm_head.weight = model.wte.weight  # shared, as in __init__
        return model

    def save_pretrained(self, folder):
        """Write model.safetensors and config.json, for from_pretrained or transformers."""
        folder = os.path.expanduser(folder)
        os.makedirs(folder, exist_ok=True)
        header = {'__metadata__': {'format': 'pt'}}
        data = bytearray()
        for name, p in self.named_parameters():
            p = p.detach().float().cpu()
            if name.endswith(transposed):
                p = p.t()
            first = len(data)
            data += p.contiguous().numpy().tobytes()
            header[name] = {'dtype': 'F32', 'shape': list(p.shape),
                            'data_offsets': [first, len(data)]}
        header = json.dumps(header).encode()
        header += b' ' * (-len(header) % 8)  # aligns the numbers
        path = f'{folder}/model.safetensors'
        with open(path + '.tmp', 'wb') as file:
            file.write(len(header).to_bytes(8, 'little') + header)
            file.write(data)
        os.replace(path + '.tmp', path)
        c = self.config
        stored = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', n_layer=c.n_layer,
                      n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size,
                      vocab_size=c.vocab_size, activation_function='gelu_new',
                      bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)
        with open(f'{folder}/config.json', 'w', encoding='utf-8') as file:
            json.dump(stored, file, indent=2)

class Int8Linear(nn.Module):
    """A linear layer with weights rounded to 8 bits, with a scale for each output. Each new
    token reads all weights from memory: the fewer bytes, the faster."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = (weight.abs().amax(dim=1) / 127).bfloat16()
        self.weight = (weight / self.scale[:, None]).round().to(torch.int8)
        self.bias = linear.bias

    def forward(self, x):
        y = torch._weight_int8pack_mm(x.flatten(0, 1).bfloat16(), self.weight, self.scale)
        y = y.view(*x.shape[:2], -1)
        return y if self.bias is None else y + self.bias

def round_to_int8(model):
    """Replace the linear layers by Int8Linear (its kernel needs a multiple of 16 inputs)."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and layer.in_features % 16 == 0:
                setattr(parent, name, Int8Linear(layer))

# ------------------------------------------------------------------ scores and samples
def sum_over_ranks(number):
    """The sum of number over all processes."""
    if world_size == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()

@torch.no_grad()
def evaluate(model, tokens):
    """Mean loss over all whole sequences of the tokens (an array), in nats per token."""
    model.eval()  # dropout off
    T = model.config.block_size
    tokens = torch.from_numpy(tokens.astype(np.int64)).to(model.wte.weight.device)
    n = (len(tokens) - 1) // T  # number of whole sequences
    x = tokens[:n * T].view(n, T)[rank::world_size]
    y = tokens[1:n * T + 1].view(n, T)[rank::world_size]
    total = 0.0
    for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
        if len(xb) > 0:  # a process may get no sequences
            with autocast:
                _, loss = model(xb, yb)
            total += loss.item() * len(xb)
    return sum_over_ranks(total) / n

def bits_per_byte(loss, tokens, encoding):
    """Nats per token -> bits per byte of the text, comparable between vocabularies."""
    text = encoding.decode_bytes([i for i in tokens.tolist() if i != encoding.eot_token])
    return loss / math.log(2) * len(tokens) / len(text)  # <|endoftext|> has no bytes

def read_hellaswag(n):
    """The first n questions of HellaSwag (Zellers et al. 2019), a list of dicts."""
    path = os.path.expanduser(f'{cache_dir}/hellaswag_val.jsonl')
    fetch('https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl',
          path)
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file][:n]

@torch.no_grad()
def score_hellaswag(model, encoding, questions):
    """Which of four endings continues a text? Returns two accuracies, of choosing the ending
    whose loss, summed over its tokens or averaged, is lowest."""
    model.eval()
    n_right = np.zeros(2)
    for question in questions[rank::world_size]:
        start = encoding.encode_ordinary(question['ctx'])
        scores = []
        for ending in question['endings']:
            ending = encoding.encode_ordinary(' ' + ending)
            ids = (start + ending)[-model.config.block_size - 1:]
            idx = torch.tensor(ids, device=model.wte.weight.device)
            with autocast:
                logits, _ = model(idx[None, :-1])
            losses = F.cross_entropy(logits[0], idx[1:], reduction='none')[-len(ending):]
            scores.append((losses.sum().item(), losses.mean().item()))
        n_right += np.argmin(scores, axis=0) == question['label']  # by sum, by mean
    return [sum_over_ranks(n) / len(questions) for n in n_right]

def sample(model, encoding, n):
    """Write n tokens after the prompt, each as soon as it is drawn."""
    model.eval()
    print('-' * 64 + '\n' + prompt, end='')
    idx = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    idx = torch.tensor([idx], device=model.wte.weight.device)  # (1, T)
    utf8 = codecs.getincrementaldecoder('utf-8')('replace')  # a token can end inside a character
    with autocast:
        for token in model.generate(idx, n, temperature, top_k, top_p):
            if token.item() == encoding.eot_token:
                break
            piece = encoding.decode_single_token_bytes(token.item())
            print(utf8.decode(piece), end='', flush=True)
    print()

# ------------------------------------------------------------------ training
if __name__ == '__main__':
    if hasattr(sys.stdout, 'reconfigure'):  # print line by line; '?' for unprintable letters
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    if world_size > 1:
        assert 'LOCAL_RANK' in os.environ, 'WORLD_SIZE is set, but not by torchrun'
        if device_type == 'cuda':
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device_type == 'cuda' else 'gloo',
                                timeout=datetime.timedelta(hours=2))  # for downloads
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')  # one process prints for all

    # the weights to start from: a checkpoint's, those of GPT-2 or of a folder, or random ones
    assert not (resume and init_from), 'resume continues from the checkpoint: leave out init_from'
    sizes, merges = {}, None  # merges: the pairs from learn_bpe; None: GPT-2's vocabulary
    if resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        sizes, merges = saved['sizes'], saved['merges']
    elif init_from:
        model = GPT.from_pretrained(init_from, dropout)
        sizes = dataclasses.asdict(model.config)
        path = os.path.expanduser(f'{init_from}/merges.json')
        if os.path.exists(path):
            with open(path) as file:
                merges = json.load(file)

    # the vocabulary: that of the weights, else learned from the text, or GPT-2's for shards
    if is_text and not sizes:
        train_text, _ = read_text()
        merges = learn_bpe(train_text[:10_000_000], vocab_size - 1)  # and one for <|endoftext|>
    encoding = make_encoding(merges)
    n_vocab = sizes.setdefault('vocab_size', encoding.n_vocab)
    assert n_vocab == encoding.n_vocab, (
        f'the weights expect {n_vocab} tokens, the vocabulary has {encoding.n_vocab}')
    globals().update(sizes)
    override()  # sizes on the command line win, and are then compared
    if init_from and block_size < sizes['block_size']:
        model.wpe.weight = nn.Parameter(model.wpe.weight[:block_size].detach().clone())
        model.config.block_size = sizes['block_size'] = block_size
    for name, size in sizes.items():
        assert globals()[name] == size, f'{name} must be {size}, as in weights or vocabulary'
    assert n_embd % n_head == 0, f'n_embd ({n_embd}) must be a multiple of n_head ({n_head})'
    assert checkpoint and (os.path.isfile(checkpoint) or not os.path.exists(checkpoint)), (
        f'checkpoint: {checkpoint!r} is not a file')
    assert temperature > 0 and top_p > 0, 'temperature and top_p must be above 0'
    assert not int8 or device == 'cpu', 'int8 needs --device=cpu'
    if export:
        export = os.path.expanduser(export)
        os.makedirs(export, exist_ok=True)
    questions = read_hellaswag(hellaswag) if hellaswag > 0 else []

    # the tokens to train on: of the text, or shards
    if max_iters > 0:
        assert is_text or merges is None, f'{dataset} is in GPT-2 tokens, unlike the weights'
        train_shards, val_data = read_tokens(encoding)
        print(f'{dataset}: {sum(map(len, train_shards)):,} tokens to train on, '
              f'{len(val_data):,} to validate on')
        shortest = min(map(len, train_shards + [val_data]))
        assert shortest >= 2 * block_size, (
            f'{dataset} is too short: a part has {shortest} tokens, {2 * block_size} are needed')
        # micro-batches per step and process
        grad_accum_steps, rest = divmod(total_batch_size, batch_size * block_size * world_size)
        assert grad_accum_steps > 0 and rest == 0, (
            f'total_batch_size must be a multiple of {batch_size * block_size * world_size}, '
            'which is batch_size x block_size x processes')
        # whole sequences, and the last target
        val_data = val_data[:(len(val_data) - 1) // block_size * block_size + 1]
        checksum = zlib.crc32(val_data.tobytes())  # another text has another best loss
        assert not resume or saved['checksum'] == checksum, (
            f'{checkpoint} was trained on another {dataset}')

    torch.manual_seed(seed)
    sizes = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                 n_embd=n_embd)
    if not init_from:
        model = GPT(GPTConfig(**sizes, dropout=dropout))
    model.to(device)
    print(f'{world_size} x {device}, {dtype}; {sum(p.numel() for p in model.parameters()):,} '
          f'parameters; {vocab_size:,} distinct tokens')
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # LayerNorm, biases: not decayed
    optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': weight_decay},
                                   {'params': vectors, 'weight_decay': 0.0}],
                                  betas=(0.9, beta2), fused=True)
    # only float16 needs it: a larger loss keeps small gradients from rounding to zero
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    if device_type == 'cpu' and dtype == 'bfloat16':  # FlashAttention: long sequences only
        torch.backends.cuda.enable_flash_sdp(block_size > 128)
    train_model = torch.compile(model) if use_compile else model

    step = 0
    train_loss = 0.0  # running mean of about the last 100 steps
    best_loss = math.inf  # lowest validation loss
    best = {}  # the weights that reached it
    if resume:
        model.load_state_dict(saved['model'])
        # use this run's betas and weight decay, not the saved ones
        saved['optimizer']['param_groups'] = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict(saved['optimizer'])
        step, train_loss = saved['step'], saved['train_loss']
        best, best_loss = saved['best'], saved['best_loss']
        print(f'loaded {checkpoint}, saved after step {step}, with {sizes}')

    def save():
        """Write a new file, then rename it: a killed run leaves the old file or the new one."""
        if rank == 0:
            torch.save(dict(sizes=sizes, merges=merges, checksum=checksum, step=step,
                            train_loss=train_loss, model=model.state_dict(),
                            optimizer=optimizer.state_dict(), best=best, best_loss=best_loss),
                       checkpoint + '.tmp')
            os.replace(checkpoint + '.tmp', checkpoint)

    if step < max_iters and rank == 0:
        open(checkpoint + '.tmp', 'wb').close()  # if files cannot be written, fail now, not later
        if os.path.isfile(checkpoint) and not resume:
            os.replace(checkpoint, checkpoint + '.old')
            print(f'renamed the earlier {checkpoint} to {checkpoint}.old')
    if max_iters > 0:
        n_read = step * (total_batch_size // block_size)  # sequences read before a resume
        source = itertools.islice(sequences(train_shards), n_read, None)

    stop = all_stop = False  # Ctrl-C in this process; in any process
    def interrupt(*_):
        """First Ctrl-C: end training after the current step. Second: stop at once."""
        global stop
        stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    start_time = time.time()
    while step < max_iters and not all_stop:
        step += 1
        # a resumed run draws the same numbers, each process its own
        torch.manual_seed((seed * world_size + rank) * 10**6 + step)
        lr = learning_rate * math.cos(math.pi / 2 * (step - 1) / max_iters)  # falls to zero
        lr = lr * min(step / (warmup_ratio * max_iters + 1), 1)  # rises from near zero
        for group in optimizer.param_groups:
            group['lr'] = lr
        # forward and backward, one micro-batch after another: their gradients add up
        model.train()  # dropout on
        model.zero_grad()
        x, y = get_batch(source)
        step_loss = 0.0
        for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
            with autocast:
                logits, loss = train_model(xb, yb)
            loss = loss / (grad_accum_steps * world_size)  # its share of the mean
            scaler.scale(loss).backward()
            step_loss += loss.item()
        step_loss = sum_over_ranks(step_loss)
        if world_size > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        # a step against the gradient
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()

        assert step_loss < 100, f'the loss is {step_loss}; lower the learning rate'
        train_loss += (step_loss - train_loss) / min(step, 100)
        if step % max(1, max_iters // 20) == 0 and not stop:
            print(f'{step:6} {"*" * int(7 * train_loss)}')  # 7 stars for each nat
        if step % eval_interval == 0 or step == max_iters:
            val_loss = evaluate(model, val_data)
            assert val_loss < 100, f'the validation loss is {val_loss}; lower the learning rate'
            if val_loss < best_loss:
                best_loss = val_loss
                best = {name: p.clone() for name, p in model.state_dict().items()}
            save()
            print(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
                  f'{time.time() - start_time:.1f} s')
            sample(model, encoding, 30)
        all_stop = sum_over_ranks(stop) > 0  # all processes stop together
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if all_stop:
        save()
        print(f'stopped after step {step}')

    if best:
        model.load_state_dict(best)
        print(f'best val loss {best_loss:.4f}, perplexity {math.exp(best_loss):.2f}')
        if max_iters > 0:
            print(f'{bits_per_byte(best_loss, val_data[1:], encoding):.4f} bits per byte')
    if hellaswag > 0:
        by_sum, by_mean = score_hellaswag(model, encoding, questions)
        print(f'HellaSwag: {by_sum:.4f} by sum, {by_mean:.4f} by mean')
    if export and rank == 0:
        model.save_pretrained(export)
        with open(f'{export}/merges.json', 'w') as file:
            json.dump(merges, file)  # null: GPT-2's vocabulary
        print(f'wrote {export}/model.safetensors, config.json and merges.json')
    if world_size > 1:
        dist.barrier()  # a process that ends during another's last all_reduce can crash it
        dist.destroy_process_group()

    # -------------------------------------------------------------- sampling
    if rank == 0:
        if int8:
            round_to_int8(model)
        sample(model, encoding, max_new_tokens)
