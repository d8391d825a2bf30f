"""gpt2.py: its weights, its vocabulary, its data, its scores, its processes."""
import collections, json, math, os, re, subprocess, sys, time, unittest
from unittest import mock
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from common import (SMALL, TEXT, Server, call, evaluate, execute, fit, folder_with, get_batch,
                    load, read, run, sample)

SCRIPT = 'gpt2.py'
GPT2 = mock.Mock(n_vocab=50257, eot_token=50256, encode_ordinary=lambda text: [*text.encode()],
                 decode_bytes=lambda tokens: b'x' * len(tokens),
                 decode_single_token_bytes=lambda _: b'x')  # its vocabulary is a download

class Gpt2(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.trained = run(SCRIPT, '--export=out --top_k=1')
        cls.names = cls.trained.names

    def sizeless(self, more):
        """A run whose sizes and vocabulary are those of other weights or shards."""
        settings = re.sub(r'--(n_layer|n_head|n_embd|block_size|vocab_size)=\S+', '', SMALL)
        with mock.patch('tiktoken.get_encoding', return_value=GPT2):
            return execute(SCRIPT, fit(SCRIPT, settings) + f' --dtype=float32 {more}',
                           self.trained.folder)

    def gpt(self, *sizes):
        torch.manual_seed(1)
        model = self.names['GPT'](self.names['GPTConfig'](*sizes)).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)  # biases and gains too
        return model

    def test_import(self):
        """Imported, it trains nothing; the 124M shape has as many parameters as OpenAI's."""
        names = {'__name__': 'gpt2'}
        exec(read(SCRIPT), names)
        self.assertNotIn('model', names)
        with torch.device('meta'):
            model = names['GPT'](names['GPTConfig']())
        self.assertEqual(sum(p.numel() for p in model.parameters()), 124_439_808)

    def test_int8(self):
        """Weights rounded to 8 bits change little."""
        linear, x = nn.Linear(64, 48), torch.randn(2, 5, 64)
        exact = linear(x)
        rounded = self.names['Int8Linear'](linear).bfloat16()
        self.assertLess((rounded(x.bfloat16()) - exact).std(), 0.007 * exact.std())
        for width, kind in (32, 'Int8Linear'), (20, 'Linear'):  # the kernel takes 16 n
            names = run(SCRIPT, f'--n_embd={width} --dtype=bfloat16 --int8=True').names
            self.assertEqual(type(names['model'].h[0].attn.c_attn).__name__, kind)

    def test_files(self):
        """Weights in OpenAI's layout, both ways; wrong, damaged and short files are refused."""
        model = self.gpt(16, 101, 2, 4, 32)
        def from_pretrained(name):
            return call(self.names, 'from_pretrained', name=name, dropout=0.0)
        folder = folder_with(None)
        call(self.names, 'save_pretrained', model=model, folder=folder)
        file = folder / 'model.safetensors'
        config = (folder / 'config.json').read_text()
        stored = model.state_dict() | {'h.0.attn.bias': torch.ones(1, 1, 16, 16)}
        for name, t in stored.items():
            stored[name] = t.t() if t.dim() == 2 and name.startswith('h.') else t
        del stored['lm_head.weight']
        for kind, dtype, prefix in (('F32', torch.float32, ''), ('F16', torch.float16, ''),
                                    ('BF16', torch.bfloat16, 'transformer.')):
            header = {'__metadata__': {'format': 'pt'}}
            data = b''
            for name, t in stored.items():
                begin = len(data)
                data += t.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
                header[prefix + name] = {'dtype': kind, 'shape': [*t.shape],
                                         'data_offsets': [begin, len(data)]}
            head = json.dumps(header).encode()
            whole = len(head).to_bytes(8, 'little') + head + data
            file.write_bytes(whole)
            loaded = from_pretrained(str(folder))
            call(self.names, 'save_pretrained', model=loaded, folder=folder)
            for other in loaded, from_pretrained(str(folder)):
                self.assertEqual(other.config, model.config)
                for p, q in zip(model.parameters(), other.parameters(), strict=True):
                    self.assertTrue(torch.equal(p.to(dtype).float(), q), kind)
            # a head of its own is another model; a copy of wte is none
            stored['lm_head.weight'] = stored['wte.weight']
        rows = (  # what is replaced in the weights, part of the message
            (b'1.ln_2.bias', b'1.attn.bias', 'Missing key.*h.1.ln_2.bias'),
            (b'0.attn.bias', b'0.attn.else', 'Unexpected key.*h.0.attn.else'),
            (b'[128, 32]', b'[32, 128]', 'size mismatch for h.0.mlp.c_proj.weight'),
            (b'BF16', b'BI16', 'BI16'), (whole, whole[:-300], 'instead of'),
            (whole, whole + b'abc', 'instead of'), (whole, b'hello, world', 'not a safetensors'),
            (whole, whole[:-1] + b'9', 'lm_head and wte differ'))
        for old, new, message in rows:
            file.write_bytes(whole.replace(old, new))
            with self.assertRaisesRegex(Exception, f'(?s){message}'):
                from_pretrained(str(folder))
        file.write_bytes(whole)
        for old, new, message in (
                ('"n_head"', '"heads"', 'n_head'), ('gelu_new', 'relu', 'gelu_new'),
                ('"n_head"', '"scale_attn_weights": false, "n_head"', 'scale_attn_weights')):
            (folder / 'config.json').write_text(config.replace(old, new))
            with self.assertRaisesRegex(Exception, message):
                from_pretrained(str(folder))
        file.unlink()
        with self.assertRaisesRegex(AssertionError, 'model.safetensors; init_from: gpt2, '):
            from_pretrained(str(folder))

    def test_vocabulary(self):
        """Each merge is of a most frequent pair, by a naive count; any text comes back from its
        tokens; <|endoftext|> in a text is text; a long word takes no time."""
        text = TEXT + 'zzzzz naïve – ½ ²3 don\'t  \n\n x_y ' * 9
        words = [word.encode().decode('latin-1')
                 for word in re.findall(self.names['pattern'], text)]
        self.assertEqual(''.join(words), text.encode().decode('latin-1'))
        merges = self.names['learn_bpe'](text, 300)
        self.assertEqual(len(merges), 44)
        for i, pair in enumerate(merges, 256):
            pairs = collections.Counter()
            for word in words:
                pairs.update(zip(word, word[1:]))
            self.assertEqual(pairs[chr(pair[0]), chr(pair[1])], max(pairs.values()))
            words = [word.replace(chr(pair[0]) + chr(pair[1]), chr(i)) for word in words]
        encoding = self.names['make_encoding'](merges)
        merged = [*map(ord, ''.join(words))]
        self.assertEqual(encoding.encode_ordinary(text)[:1500], merged[:1500])
        for s in (text, '', '日本語 🎉\x00\r\n\t  ', ''.join(map(chr, range(3000)))):
            self.assertEqual(encoding.decode(encoding.encode_ordinary(s)), s)
        self.assertEqual(self.names['learn_bpe']('abc', 300), [])
        dna = ''.join('ACGT'[i * i * 7919 // 1000 % 4] for i in range(100_000))
        start = time.time()
        names = run(SCRIPT, '--max_iters=1', folder_with('<|endoftext|>\r\n' * 99 + dna)).names
        self.assertLess(time.time() - start, 10)
        encoding, tokens = names['encoding'], [*names['train_shards'][0], *names['val_data']]
        self.assertEqual(encoding.eot_token, names['vocab_size'] - 1)
        self.assertNotIn(encoding.eot_token, tokens)
        self.assertEqual(encoding.decode(tokens), '<|endoftext|>\n' * 99 + dna)

    def test_shards(self):
        """Shards of tokens are downloaded once, whole, checked, and read piece by piece."""
        page = '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}.bin'
        bodies = {}
        for count, name in ((2000, 'val_000000'), (3000, 'train_000001'), (4000, 'train_000002')):
            whole = np.array([20240520, 1, count] + [0] * 253, '<i4').tobytes()
            whole += np.arange(count, dtype='<u2').tobytes()
            bodies[page.format(name)] = whole
        folder = folder_with(None) / 'fineweb'
        def shards(more):
            return self.sizeless('--n_layer=1 --n_embd=8 --block_size=16 --max_iters=1 '
                                 f'--cache_dir={folder.parent} {more}')

        for broken in True, False, False:
            with Server(bodies, [page.format('train_000002')] * broken) as server:
                first = shards('--dataset=fineweb --n_shards=2')
            self.assertEqual('incomplete' in first.message, broken, first.message)
            self.assertEqual(len(list(folder.iterdir())), 2 if broken else 3)
        self.assertEqual(server.asked, [])  # the third time all are there
        names = first.names
        again = shards(f'--dataset={folder}').names  # as a folder of one's own
        for more, message in (('--vocab_size=300', 'vocab_size must be 50257'),
                              ('--init_from=out --n_layer=2 --n_embd=32', 'GPT-2 tokens')):
            self.assertIn(message, shards(f'--dataset={folder} {more}').message)
        for found in names, again:
            self.assertEqual([len(shard) for shard in found['train_shards']], [3000, 4000])
            self.assertEqual(len(found['val_data']), 2000)
        # an epoch takes each piece once; each has an offset and an order of its own
        pieces = call(names, 'sequences', train_shards=[np.arange(96), np.arange(1000, 1048)])
        seen = []
        for _ in range(4):
            epoch = [next(pieces) for _ in range(5 + 2)]
            for piece in epoch:
                self.assertEqual(piece.tolist(), [*range(piece[0], piece[0] + 17)])
            starts = [piece[0] for piece in epoch]
            self.assertEqual(sorted(starts)[:5], [*range(min(starts), min(starts) + 80, 16)])
            self.assertEqual(sorted(starts)[5] + 16, sorted(starts)[6])
            seen.append(tuple(starts))
        self.assertEqual(len(set(seen)), 4)
        x, y = get_batch(names, source=call(names, 'sequences'))
        self.assertEqual(x.shape, (8, 16))
        self.assertTrue(torch.equal(x + 1, y))
        big = folder / 'big.bin'  # over 2 GB, most of it a hole
        big.write_bytes(np.array([20240520, 1, 2**30] + [0] * 253, '<i4').tobytes())
        os.truncate(big, 1024 + 2 * 2**30)
        self.assertEqual(len(names['read_shard'](big)), 2**30)
        big.unlink()
        for bad in (b'', whole[:-2], whole + b'ab', b'.' + whole[1:]):
            (folder / 'train_000002.bin').write_bytes(bad)
            self.assertRegex(shards(f'--dataset={folder}').message, 'train_000002|IndexError')

    def test_scores(self):
        """The last tenth of a text is scored exactly, without dropout, in bits per byte; on
        HellaSwag as a second scorer does. An export samples and scores the same."""
        names = self.names
        encoding, val = names['encoding'], names['val_data']
        train = encoding.decode(names['train_shards'][0].tolist())
        self.assertEqual(train + encoding.decode(val.tolist()), TEXT)
        self.assertAlmostEqual(len(train) / len(TEXT), 0.9, 3)
        val = np.array(val[:151])
        val[100] = encoding.eot_token  # which is no byte of the text
        model = self.gpt(16, 300, 2, 2, 32, 0.5)  # with dropout, which must not act
        total = 0.0
        for i in range(0, 144, 16):
            x = torch.from_numpy(val[i:i + 17])
            total += F.cross_entropy(model(x[None, :-1])[0][0], x[1:], reduction='sum').item()
        size = len(encoding.decode_bytes(val[1:100].tolist() + val[101:145].tolist()))
        with mock.patch.dict(names):
            self.assertAlmostEqual(evaluate(names, model.train(), val), total / 144, 4)
            bits = call(names, 'bits_per_byte', loss=total / 144, val_data=val, tokens=val,
                        encoding=encoding)
        self.assertAlmostEqual(bits, total / math.log(2) / size, 5)
        self.assertTrue(1 < float(re.search('([0-9.]+) bits per byte', self.trained.out)[1]) < 8)

        rows = []
        right = np.zeros(2)
        model = names['GPT'](names['model'].config).eval()
        model.load_state_dict(load(self.trained)['best'])
        for i in range(1, 41):
            row = {'ctx': TEXT[7 * i:8 * i]}
            row['endings'] = [TEXT[n * i:n * i + n] for n in (5, 7, 9, 11)]
            scores = []
            for ending in row['endings']:
                end = encoding.encode_ordinary(f' {ending}')
                x = torch.tensor((encoding.encode_ordinary(row['ctx']) + end)[-17:])
                loss = F.cross_entropy(model(x[None, :-1])[0][0], x[1:], reduction='none')
                loss = loss[-len(end):].sum().item()
                scores.append((loss, loss / len(end)))
            chosen = np.argmin(scores, axis=0).tolist()  # by sum and by mean
            row['label'] = chosen[i % 3 > 0]
            right += np.equal(chosen, row['label'])
            rows.append(json.dumps(row))
        self.assertNotEqual(*right)
        page = '/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
        folder = self.trained.folder
        with Server({page: '\n'.join(rows + rows[:1]).encode()}):
            scored = self.sizeless('--init_from=out --max_iters=0 --top_k=1 --hellaswag=40 '
                                       f'--cache_dir={folder}')
        self.assertIn(f'{right[0] / 40:.4f} by sum, {right[1] / 40:.4f} by mean', scored.out)
        self.assertEqual(sample(scored.out), sample(self.trained.out))
        for rank in (0, 1):  # two processes share the rows
            scored.names.update(rank=rank, world_size=2, sum_over_ranks=float,
                                fetch=lambda *_: None)
            right -= 40 * np.array(call(scored.names, 'score_hellaswag'))
        np.testing.assert_allclose(right, 0, atol=1e-9)

    def test_processes(self):
        """Micro-batches and processes change no step; one process downloads for all."""
        whole = run(SCRIPT, '--total_batch_size=256 --batch_size=16 --dropout=0')
        parts = run(SCRIPT, '--total_batch_size=256 --batch_size=4 --dropout=0')
        two = folder_with(None)
        page = '/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
        with Server({page: TEXT.encode()}, seconds=1) as server:
            source = re.sub(r'https://raw[\w.]+', server.address, read(SCRIPT))
            (two / SCRIPT).write_text(source, encoding='utf-8')
            settings = fit(SCRIPT, f'{SMALL} --dtype=float32 --total_batch_size=256 --dropout=0')
            command = f'-m torch.distributed.run --standalone --nproc_per_node=2 {SCRIPT} '
            done = subprocess.run([sys.executable, *(command + settings).split()], cwd=two,
                                  capture_output=True, encoding='utf-8')
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(server.asked), 1)
        self.assertEqual((two / 'input.txt').read_bytes(), TEXT.encode())
        self.assertEqual(done.stdout.count('best val loss'), 1)
        saved = load(whole)
        for other in parts, mock.Mock(folder=two):
            other = load(other)
            for name, p in saved['model'].items():
                if not name.endswith('c_attn.bias'):  # that of k has no gradient but rounding
                    torch.testing.assert_close(other['model'][name], p, atol=1e-4, rtol=1e-4)
            self.assertAlmostEqual(other['train_loss'], saved['train_loss'], 4)
            self.assertAlmostEqual(other['best_loss'], saved['best_loss'], 4)
        with mock.patch.dict(os.environ, WORLD_SIZE='2'):
            self.assertIn('not by torchrun', run(SCRIPT).message)

    def test_settings(self):
        """Sizes and vocabulary are those of the weights; what is typed holds or is refused."""
        for more in '--resume', '--init_from=out --block_size=16 --checkpoint=b.pt':
            names = self.sizeless(f'{more} --max_iters=24').names
            self.assertEqual(names['model'].config, names['GPTConfig'](16, 300, 2, 2, 32, 0.1))
            self.assertEqual((names['block_size'], names['model'].drop.p), (16, 0.1))
            for name, size in dict(n_layer=3, n_head=4, n_embd=64, vocab_size=400).items():
                refused = self.sizeless(f'{more} --max_iters=24 --{name}={size}')
                self.assertIn(f'{name} must be', refused.message)
        for more, message in (('--resume --block_size=32', 'block_size must be 16'),
                              ('--init_from=out --block_size=32', 'block_size must be at most')):
            ended = self.sizeless(f'{more} --batch_size=4 --max_iters=26')
            self.assertIn(message, ended.message)
        # rows that only pad GPT-2's table are cut off; another number is refused
        for size, message in (50304, 'fine'), (50257, 'fine'), (300, 'weights expect 300 tokens'):
            model = self.gpt(16, size, 1, 2, 4)
            padded = self.trained.folder / 'padded'
            call(self.names, 'save_pretrained', model=model, folder=padded)
            ended = self.sizeless('--init_from=padded --max_iters=0')
            self.assertIn(message, ended.message)
            if message == 'fine':
                wte = ended.names['model'].wte.weight
                self.assertTrue(torch.equal(wte, model.wte.weight[:50257]))
