"""gpt2.py: its weights, its vocabulary, its data, its scores, its processes."""
import collections, contextlib, io, json, math, os, re, subprocess, sys, time, unittest
from unittest import mock
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from common import (SHAKESPEARE, SMALL, TEXT, call, execute, fit, folder_with, load, read, run,
                    sample, serve)

SCRIPT = 'gpt2.py'
GPT2 = mock.Mock(n_vocab=50257, eot_token=50256, encode_ordinary=lambda text: [*text.encode()],
                 decode_bytes=lambda tokens: b'x' * len(tokens),
                 decode_single_token_bytes=lambda _: b'x')  # its vocabulary is a download

class Gpt2(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.trained = run(SCRIPT, '--export=out --top_k=1')
        cls.names = {'__name__': 'gpt2'}  # imported, it trains nothing
        exec(read(SCRIPT), cls.names)

    def sizeless(self, more):
        """A run whose sizes and vocabulary are those of other weights or shards."""
        settings = re.sub(r'--(n_layer|n_head|n_embd|block_size|vocab_size)=\S+', '', SMALL)
        with mock.patch('tiktoken.get_encoding', return_value=GPT2):
            return execute(SCRIPT, fit(SCRIPT, settings) + f' --dtype=float32 {more}',
                           self.trained.folder)

    def save(self, folder, *sizes):
        """A model of these sizes, with random weights, biases and gains, in the folder, too."""
        torch.manual_seed(1)
        model = self.names['GPT'](self.names['GPTConfig'](*sizes)).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        model.save_pretrained(folder)
        return model

    def test_int8(self):
        """Weights rounded to 8 bits change little."""
        linear, x = nn.Linear(64, 48), torch.randn(2, 5, 64)
        exact = linear(x)
        rounded = self.names['Int8Linear'](linear).bfloat16()
        self.assertLess((rounded(x.bfloat16()) - exact).std(), 0.007 * exact.std())

    def test_int8_setting(self):
        """With int8 the sample is that of a model with all its linear layers rounded."""
        model = run(SCRIPT, '--max_iters=0 --int8').names['model']
        rounded = [part for part in model.modules() if type(part).__name__ == 'Int8Linear']
        self.assertEqual(len(rounded), 2 * 4 + 1)
        self.assertFalse([part for part in model.modules() if isinstance(part, nn.Linear)])

    def test_letters(self):
        """A letter of several tokens is written whole; <|endoftext|> ends the text."""
        names, encoding = self.trained.names, self.trained.names['encoding']
        tokens = torch.tensor([*'é日🎉'.encode(), encoding.eot_token, 65])  # bytes are tokens
        with (mock.patch.object(names['GPT'], 'generate', return_value=tokens[:, None, None]),
              contextlib.redirect_stdout(io.StringIO()) as screen):
            call(names, 'sample', n=9)
        self.assertEqual(sample(screen.getvalue()), names['prompt'] + 'é日🎉\n')

    def test_openai(self):
        """OpenAI's weights are fetched once, each name's own."""
        folder = folder_with(None)
        self.save(folder / 'xl', 16, 50257, 1, 2, 4)
        where = '/openai-community/gpt2-xl/resolve/main/'
        bodies = {where + file: (folder / 'xl' / file).read_bytes()
                  for file in ('config.json', 'model.safetensors')}
        more = f'--init_from=gpt2-xl --max_iters=0 --cache_dir={folder}'
        for count in 2, 0:
            with serve(bodies) as (_, asked):
                self.assertEqual(self.sizeless(more).message, 'fine')
            self.assertEqual(len(asked), count)

    def test_unseen(self):
        """The vocabulary is learned without the validation text; of a shard, ten million tokens
        are enough to validate on."""
        text = TEXT[:9000 - 900] + 'zq' * 450
        names = run(SCRIPT, '--max_iters=1', folder_with(text)).names
        n = int(0.9 * len(text))
        self.assertEqual(names['merges'], names['learn_bpe'](text[:n], 299))
        folder = folder_with(None)
        for name in 'val', 'train':
            header = np.array([20240520, 1, 10_000_009] + [0] * 253, '<i4').tobytes()
            (folder / f'{name}.bin').write_bytes(header)
            os.truncate(folder / f'{name}.bin', 1024 + 2 * 10_000_009)
        _, val = call(names, 'read_tokens', dataset=str(folder), is_text=False)
        self.assertEqual(len(val), 10_000_000)

    def test_files(self):
        """Weights in OpenAI's layout, both ways; wrong, damaged and short files are refused."""
        self.assertNotIn('model', self.names)
        with torch.device('meta'):
            small = self.names['GPT'](self.names['GPTConfig']())
        self.assertEqual(sum(p.numel() for p in small.parameters()), 124_439_808)
        folder = folder_with(None)
        model = self.save(folder, 16, 101, 2, 4, 32)
        def from_pretrained():
            return self.names['GPT'].from_pretrained(str(folder))
        file = folder / 'model.safetensors'
        stored = {'h.0.attn.bias': torch.ones(1, 1, 16, 16)}  # a causal mask
        for name, p in model.named_parameters():
            stored[name] = p.detach().t() if p.dim() == 2 and name[0] == 'h' else p.detach()
        for kind, dtype, prefix in (('F32', torch.float32, ''), ('F16', torch.float16, ''),
                                    ('BF16', torch.bfloat16, 'transformer.')):
            header, data = {'__metadata__': {'format': 'pt'}}, b''
            for name, t in stored.items():
                raw = t.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
                header[prefix + name] = dict(dtype=kind, shape=[*t.shape],
                                             data_offsets=[len(data), len(data) + len(raw)])
                data += raw
            head = json.dumps(header).encode()
            whole = len(head).to_bytes(8, 'little') + head + data
            file.write_bytes(whole)
            loaded = from_pretrained()
            loaded.save_pretrained(folder)
            for other in loaded, from_pretrained():
                self.assertEqual(other.config, model.config)
                for p, q in zip(model.parameters(), other.parameters(), strict=True):
                    self.assertTrue(torch.equal(p.to(dtype).float(), q), kind)
            # a head of its own is another model; a copy of wte is none
            stored['lm_head.weight'] = stored['wte.weight']
        file.write_bytes(whole)
        for path, old, new, message in (
                (file, b'1.ln_2.bias', b'1.attn.bias', 'Missing key.*h.1.ln_2.bias'),
                (file, b'0.attn.bias', b'0.attn.else', 'Unexpected key.*h.0.attn.else'),
                (file, whole, whole[:-300], 'instead of'), (file, whole, whole + b'x', 'instead'),
                (file, whole, b'hello, world', 'not a safetensors'),
                (file, whole, whole[:-1] + b'9', 'lm_head and wte differ'),
                (folder / 'config.json', b'gelu_new', b'relu', 'gelu_new'),
                (folder / 'config.json', b'{', b'{"scale_attn_weights": false, ', 'scale_attn')):
            good = path.read_bytes()
            path.write_bytes(good.replace(old, new))
            with self.assertRaisesRegex(Exception, f'(?s){message}'):
                from_pretrained()
            path.write_bytes(good)
        file.unlink()
        with self.assertRaisesRegex(AssertionError, 'model.safetensors; init_from: gpt2, '):
            from_pretrained()

    def test_vocabulary(self):
        """Each merge is of a most frequent pair; any text comes back; long words cost no time."""
        text = TEXT + "zzzzz naïve – ½ ²3 don't  \n\n x_y " * 9
        words = re.findall(self.names['pattern'], text)
        self.assertEqual(''.join(words), text)
        words = [word.encode().decode('latin-1') for word in words]  # a character is a token
        merges = self.names['learn_bpe'](text, 300)
        self.assertEqual(len(merges), 44)
        for i, pair in enumerate(merges, 256):
            pairs = collections.Counter()
            for word in words:
                pairs.update(zip(word, word[1:]))
            self.assertEqual(pairs[chr(pair[0]), chr(pair[1])], max(pairs.values()))
            words = [word.replace(chr(pair[0]) + chr(pair[1]), chr(i)) for word in words]
        encoding = self.names['make_encoding'](merges)
        self.assertEqual(encoding.encode_ordinary(text), [*map(ord, ''.join(words))])
        for s in text, '', '日本語 🎉\x00\r\n\t  ', ''.join(map(chr, range(3000))):
            self.assertEqual(encoding.decode(encoding.encode_ordinary(s)), s)
        self.assertEqual(self.names['learn_bpe']('abc', 300), [])
        dna = ''.join('ACGT'[i * i * 7919 // 1000 % 4] for i in range(100_000))
        start = time.time()
        names = run(SCRIPT, '--max_iters=1', folder_with('<|endoftext|>\r\n' * 99 + dna)).names
        self.assertLess(time.time() - start, 10)
        encoding, train, val = names['encoding'], names['train_shards'][0], names['val_data']
        self.assertEqual(encoding.eot_token, names['vocab_size'] - 1)
        self.assertNotIn(encoding.eot_token, [*train, *val])
        text = '<|endoftext|>\n' * 99 + dna
        n = int(0.9 * len(text))  # the last tenth is for validation
        self.assertEqual(encoding.decode([*train]), text[:n])
        self.assertTrue(text[n:].startswith(encoding.decode([*val])))  # whole sequences of it
        self.assertGreater(len(val), len(encoding.encode_ordinary(text[n:])) - 17)
        # pairs are learned from the words that tiktoken sees, whatever the letters
        marked = 'कि की कू के नमस्ते दुनिया में ' * 50
        marked += '“it’s” ½\x01 ' * 9
        learned = self.names['make_encoding'](self.names['learn_bpe'](marked, 400))
        words = re.findall(self.names['pattern'], marked)
        self.assertEqual([i for word in words for i in learned.encode_ordinary(word)],
                         learned.encode_ordinary(marked))
        self.assertEqual(len(learned.encode_ordinary(' नमस्ते')), 1)

    def test_shards(self):
        """Shards of tokens are downloaded once, whole, checked, and read piece by piece."""
        bodies = {}
        for count, name in (2000, 'val_000000'), (3000, 'train_000001'), (4000, 'train_000002'):
            whole = np.array([20240520, 1, count] + [0] * 253, '<i4').tobytes()
            whole += np.arange(count, dtype='<u2').tobytes()
            page = f'/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{name}.bin'
            bodies[page] = whole
        folder = folder_with(None) / 'fineweb'
        def shards(more):
            return self.sizeless('--n_layer=1 --n_embd=8 --block_size=16 --max_iters=1 '
                                 f'--checkpoint=shards.pt --cache_dir={folder.parent} {more}')

        for broken, count in ([page], 2), ([], 3), ([], 3):
            with serve(bodies, broken) as (_, asked):
                ended = shards('--dataset=fineweb --n_shards=2')
            self.assertEqual('incomplete' in ended.message, bool(broken), ended.message)
            self.assertEqual(len([*folder.glob('*.bin')]), count)
        self.assertEqual(asked, [])  # the third time all are there
        names = ended.names
        for found in names, shards(f'--dataset={folder}').names:  # as a folder of one's own
            self.assertEqual([len(shard) for shard in found['train_shards']], [3000, 4000])
            self.assertEqual(len(found['val_data']), 1985)  # whole sequences
        # an epoch takes each piece once; each has an offset and an order of its own
        pieces = names['sequences']([np.arange(96), np.arange(1000, 1048)])
        offsets, orders = set(), set()
        for _ in range(4):
            epoch = [next(pieces).tolist() for _ in range(5 + 2)]
            starts = sorted(piece[0] for piece in epoch)
            self.assertEqual(sorted(epoch), [[*range(i, i + 17)] for i in starts])
            a, b = starts[0], starts[5]
            self.assertEqual(starts, [*range(a, a + 80, 16), b, b + 16])
            offsets.add(a)
            orders.add(tuple(piece[0] - a for piece in epoch[:5]))
        self.assertTrue(len(offsets) > 1 and len(orders) > 1)
        x, y = names['get_batch'](names['sequences'](names['train_shards']))
        self.assertEqual(x.shape, (8, 16))
        self.assertTrue(torch.equal(x + 1, y))
        for more, message in (('--vocab_size=300', 'vocab_size must be 50257'),
                              ('--init_from=out --n_layer=2 --n_embd=32', 'GPT-2 tokens')):
            self.assertIn(message, shards(f'--dataset={folder} {more}').message)
        big = folder / 'big.bin'  # over 2 GB, most of it a hole
        big.write_bytes(np.array([20240520, 1, 2**30] + [0] * 253, '<i4').tobytes())
        os.truncate(big, 1024 + 2 * 2**30)
        self.assertEqual(len(call(names, 'read_shard', path=big)), 2**30)
        big.unlink()
        for bad in b'', whole[:-2], whole + b'ab', b'.' + whole[1:]:
            (folder / 'train_000002.bin').write_bytes(bad)
            self.assertIn('train_000002.bin: not a whole shard',
                          shards(f'--dataset={folder}').message)

    def test_scores(self):
        """Bits per byte by hand; HellaSwag by a second scorer; both of an export."""
        names, encoding = self.trained.names, self.trained.names['encoding']
        tokens = np.array(names['val_data'][:151])
        tokens[100] = encoding.eot_token  # which is no byte of the text
        size = len(encoding.decode_bytes([*tokens[1:100], *tokens[101:145]]))
        bits = names['bits_per_byte'](1.7, tokens[1:145], encoding)
        self.assertAlmostEqual(bits, 1.7 * 144 / math.log(2) / size, 5)

        rows, right = [], np.zeros(2)
        model = names['GPT'](names['model'].config).eval()
        model.load_state_dict(load(self.trained, 'gpt2')['best'])
        for i in range(1, 41):
            ctx, endings = TEXT[7 * i:8 * i], [TEXT[n * i:n * i + n] for n in (5, 7, 9, 11)]
            scores = []
            for ending in endings:
                end = encoding.encode_ordinary(f' {ending}')
                x = torch.tensor((encoding.encode_ordinary(ctx) + end)[-17:])
                loss = F.cross_entropy(model(x[None, :-1])[0][0], x[1:], reduction='none')
                loss = loss[-len(end):]
                scores.append((loss.sum().item(), loss.mean().item()))
            chosen = np.argmin(scores, axis=0).tolist()  # by sum and by mean
            label = chosen[i % 3 > 0]
            right += np.equal(chosen, label)
            rows.append(json.dumps(dict(ctx=ctx, endings=endings, label=label)))
        self.assertNotEqual(*right)
        page = '/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
        with serve({page: '\n'.join(rows + rows[:1]).encode()}):
            scored = self.sizeless('--init_from=out --max_iters=0 --top_k=1 --hellaswag=40 '
                                   f'--cache_dir={self.trained.folder}')
        self.assertIn(f'{right[0] / 40:.4f} by sum, {right[1] / 40:.4f} by mean', scored.out)
        self.assertEqual(sample(scored.out), sample(self.trained.out))
        for rank in (0, 1):  # two processes share the rows
            part = call(scored.names, 'score_hellaswag', rank=rank, world_size=2,
                        fetch=mock.Mock(), sum_over_ranks=float)
            right -= 40 * np.array(part)
        np.testing.assert_allclose(right, 0, atol=1e-9)

    def test_processes(self):
        """Micro-batches and processes change no step; one process downloads for all."""
        more = '--total_batch_size=256 --dropout=0'
        whole = run(SCRIPT, f'{more} --batch_size=16')
        parts = run(SCRIPT, f'{more} --batch_size=4')
        two = folder_with(None)
        with serve({SHAKESPEARE: TEXT.encode()}, seconds=1) as (address, asked):
            source = re.sub(r'https://raw[\w.]+', address, read(SCRIPT))
            (two / SCRIPT).write_text(source, encoding='utf-8')
            command = f'-m torch.distributed.run --standalone --nproc_per_node=2 {SCRIPT} '
            command += fit(SCRIPT, f'{SMALL} --dtype=float32 {more}')
            done = subprocess.run([sys.executable, *command.split()], cwd=two,
                                  capture_output=True, encoding='utf-8')
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(asked), 1)
        self.assertEqual(done.stdout.count('best val loss'), 1)
        for other in parts, mock.Mock(folder=two):
            for loss in 'train_loss', 'best_loss':
                self.assertAlmostEqual(load(other)[loss], load(whole)[loss], 4)
        with mock.patch.dict(os.environ, WORLD_SIZE='2'):
            self.assertIn('not by torchrun', run(SCRIPT).message)
        with mock.patch.dict(os.environ, RANK='1'):  # left over from elsewhere
            alone = run(SCRIPT)
        self.assertEqual(sample(alone.out), sample(run(SCRIPT).out))

    def test_stop_together(self):
        """Ctrl-C in one of two processes ends the training of both."""
        folder = folder_with(TEXT)
        (folder / SCRIPT).write_text(read(SCRIPT), encoding='utf-8')
        (folder / 'sitecustomize.py').write_text(  # interrupts process 1 after an evaluation
            'import os, signal, threading, time\n'
            'def stop():\n'
            '    while not os.path.exists("gpt2.pt"): time.sleep(0.01)\n'
            '    os.kill(os.getpid(), signal.SIGINT)\n'
            'if os.environ.get("RANK") == "1": threading.Thread(target=stop).start()\n')
        command = f'-m torch.distributed.run --standalone --nproc_per_node=2 {SCRIPT} '
        command += fit(SCRIPT, f'{SMALL} --dtype=float32 --batch_size=4 --max_iters=2000')
        done = subprocess.run([sys.executable, *command.split()], cwd=folder, timeout=100,
                              env={**os.environ, 'PYTHONPATH': str(folder)},
                              capture_output=True, encoding='utf-8')
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn('stopped after step', done.stdout)

    def test_settings(self):
        """Sizes and vocabulary are those of the weights; what is typed holds or is refused."""
        for more in '--resume', '--init_from=out --block_size=16 --checkpoint=b.pt':
            more += ' --batch_size=4 --max_iters=24'
            names = self.sizeless(more).names
            self.assertEqual(names['model'].config, names['GPTConfig'](16, 300, 2, 2, 32, 0.1))
            for wrong in 'n_layer=3', 'n_head=4', 'n_embd=64', 'vocab_size=400', 'block_size=32':
                message = self.sizeless(f'{more} --{wrong}').message
                self.assertRegex(message, wrong.split('=')[0] + ' must be [0-9]')
        # a shorter context is the first positions of a longer one
        more = '--init_from=out --block_size=8 --batch_size=4 --max_iters=0'
        names, full = self.sizeless(more).names, self.trained.names['model']
        idx = torch.arange(8)[None]
        self.assertTrue(torch.equal(names['model'](idx)[0], full(idx)[0]))
        self.assertEqual(names['model'].config.block_size, 8)
        ended = self.sizeless(f'{more} --max_iters=2')
        self.assertEqual(load(ended, 'gpt2')['sizes']['block_size'], 8)
        # rows that only pad GPT-2's table are cut off; another number is refused
        wte = self.save(self.trained.folder / 'padded', 16, 50304, 1, 2, 4).wte.weight
        model = self.sizeless('--init_from=padded --max_iters=0').names['model']
        self.assertTrue(torch.equal(model.wte.weight, wte[:50257]))
        self.save(self.trained.folder / 'padded', 16, 300, 1, 2, 4)
        ended = self.sizeless('--init_from=padded --max_iters=0')
        self.assertIn('weights expect 300 tokens', ended.message)

    def test_import(self):
        """What is imported works without the script's run."""
        names = dict(self.names)
        model, tokens = self.save(folder_with(None), 16, 101, 2, 4, 32), np.arange(65) % 101
        x = torch.from_numpy(tokens)
        expected = F.cross_entropy(model(x[:64].view(4, 16))[0].mT, x[1:].view(4, 16)).item()
        self.assertAlmostEqual(names['evaluate'](model, tokens), expected, 4)
        self.assertEqual(len([*model.generate(x[None, :20], 9)]), 9)
        encoding = names['make_encoding'](names['learn_bpe'](TEXT, 300))
        self.assertGreater(names['bits_per_byte'](1.0, tokens, encoding), 1)
        x, y = names['get_batch'](names['sequences']([np.arange(9000)]))
        self.assertTrue(torch.equal(x + 1, y))
        question = dict(ctx='The king', label=0, endings=['sees', 'is', 'the', 'a'])
        model = self.save(folder_with(None), 16, 300, 1, 2, 16)
        self.assertIn(names['score_hellaswag'](model, encoding, [question])[0], (0, 1))

    def test_before_training(self):
        """What can fail after the training is tried before it."""
        folder = self.trained.folder
        for more, message in (('--export=input.txt', 'exists'), ('--hellaswag=9', '404'),
                              ('--resume --init_from=out', 'init_from')):
            with serve({}):
                ended = self.sizeless(f'{more} --checkpoint=x.pt --cache_dir={folder}/none')
            self.assertIn(message, ended.message)
            self.assertNotIn('step 4', ended.out)
        with mock.patch.dict(os.environ, HOME=str(folder), USERPROFILE=str(folder)):
            run(SCRIPT, '--export=~/mine')
            self.assertEqual(self.sizeless('--init_from=~/mine --max_iters=0').message, 'fine')
        self.assertTrue((folder / 'mine' / 'merges.json').exists())
        (folder / 'input.txt').write_text(TEXT[::-1], encoding='utf-8')
        self.assertIn('another input.txt', self.sizeless('--resume').message)
        (folder / 'input.txt').write_text(TEXT, encoding='utf-8')
