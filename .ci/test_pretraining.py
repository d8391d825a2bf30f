"""pretrain_finetune.py: the corpus, its stages, LoRA."""
import contextlib, io, os, re, sys, unittest
from unittest import mock
import numpy as np
import torch
from common import (OVERFITS, STAGES, TEXT, UNTRAINED, Screen, end, evaluate, folder_with,
                    interrupt, load, losses, run, sample, serve)

SCRIPT = 'pretrain_finetune.py'
FINEWEB = '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_train_000001.bin'

def table(out):
    """{stage: [loss on the corpus, loss on input.txt]} as printed."""
    rows = re.findall(rf'^({"|".join(STAGES)}) +(\S+) +(\S+)$', out, re.M)
    return {stage: losses for stage, *losses in rows}

class Pretraining(unittest.TestCase):
    def test_characters(self):
        """The corpus comes in the characters of input.txt; what is like none is dropped."""
        for text, corpus, converted in (
                ('"to be" - or not \'tis o', '“to” be—nót\u00a0‘tis’\t’s☃∑',
                 '"to" be-not \'tis\' \'s'),
                ('“—é"', '“—é”', '“—é"'),
                ('to be-or\n', 'ﬆ–10…\r\nTo be', 't-\no be'),
                ("it's\n", 'it is "so“', "it is 's'"), ('to be\n', 'to be\n', 'to be\n')):
            folder = folder_with((text + ' \n') * 200)
            (folder / 'odd.txt').write_text((corpus + '\n') * 200, encoding='utf-8', newline='')
            names = run(SCRIPT, f'{UNTRAINED} --corpus=odd.txt', folder).names
            data = torch.cat((names['corpus_train'], names['corpus_val']))
            self.assertEqual(names['decode'](data.tolist()), (converted + '\n') * 200)
            self.assertEqual(len(names['corpus_val']), len(data) // 10)
        for corpus, message in (('ДОМ, дом\n' * 999, 'most characters'),
                                ('to be\n' * 20, 'odd.txt needs 161 characters')):
            (folder / 'odd.txt').write_text(corpus, encoding='utf-8')
            self.assertIn(message, run(SCRIPT, f'{UNTRAINED} --corpus=odd.txt', folder).message)

    def test_leak(self):
        """A corpus with a long passage of the validation text is refused; a quotation is not."""
        text = ' ' + ''.join(map(chr, range(20000, 24000)))
        for passage, message in ((text[-225:], 'validation text'), (text[3650:3840], 'fine'),
                                 (' '.join(text[-225:]), 'validation text'),
                                 (text[:3600], 'fine')):
            folder = folder_with(text)
            (folder / 'odd.txt').write_text(text[::-1] + passage, encoding='utf-8')
            self.assertIn(message, run(SCRIPT, f'{UNTRAINED} --corpus=odd.txt', folder).message)

    @mock.patch('tiktoken.get_encoding')
    def test_corpus(self, encoding):
        """The beginning of a text or of FineWeb's tokens is fetched once; what breaks off leaves
        nothing behind."""
        # a token is a byte
        encoding.return_value.decode = lambda tokens: bytes(tokens).decode(errors='replace')
        text = '\n\nThe king sees – naïve – cats.\n'.encode() * 40000
        tokens = np.frombuffer(b'<|endoftext|>' + text[2:], np.uint8).astype('<u2').tobytes()
        header = np.array([20240520, 1, len(tokens) // 2] + 253 * [0], '<i4').tobytes()
        url = 'https://a.org/text.txt'
        for corpus, body, broken, result in (  # how many bytes of the text are read or why none
                ('fineweb', header + tokens, [], 250_000 - 11), (url, text, [], 10**6),
                ('fineweb', header + tokens[:18000], [], 9000 - 11),
                ('fineweb', b'7' + header[1:] + tokens, [], 'GPT-2 tokens'),
                (url, text, ['/text.txt'], 'IncompleteRead'), (url, None, [], '404')):
            page = FINEWEB if corpus == 'fineweb' else '/text.txt'
            more = f'{UNTRAINED} --megabytes=1 --corpus={corpus}'
            with serve({page: body} if body else {}, broken) as (_, asked):
                first = run(SCRIPT, more)
                if isinstance(result, str):
                    self.assertIn(result, first.message)
                else:
                    again = run(SCRIPT, more, first.folder)
                    for names in first.names, again.names:
                        self.assertEqual(names['original'].rstrip('\ufffd'),
                                         text[:result].decode(errors='ignore'))
                self.assertEqual(asked, [page])
            if broken or not body:
                self.assertEqual({*os.listdir(first.folder)}, {'corpus.txt', 'input.txt'})

    def test_megabytes(self):
        """So much of a corpus is read, also after less of it; 100,000 characters validate."""
        url, text = 'https://a.org/text.txt', 'The king sees the cat.\n' * 100_000
        folder = folder_with(TEXT)
        with serve({'/text.txt': text.encode()}):
            for megabytes in 1, 2:
                more = f'{UNTRAINED} --megabytes={megabytes} --corpus={url}'
                names = run(SCRIPT, more, folder).names
                self.assertEqual(len(names['original']), megabytes * 10**6)
        self.assertEqual(len(names['corpus_val']), 100_000)
        names = run(SCRIPT, f'{UNTRAINED} --megabytes=1 --corpus=docstrings').names
        self.assertEqual(len(names['original']), 10**6)

    def test_docstrings(self):
        """The docstrings of Python and PyTorch, without tests and other packages."""
        root = folder_with(None) / 'tests[a]'
        for path in 'os.py', 'a/a.py', 'site-packages/b.py', 'test/c.py', 'data.txt':
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text('"""A."""\nclass C:\n    r"""B.\n\n    b"""\n    """C."""\n')
        with (mock.patch('sysconfig.get_path', return_value=str(root)),
              mock.patch.object(torch, '__path__', [str(root / 'a')])):
            ended = run(SCRIPT, '--corpus=docstrings')
        self.assertIn('docstrings needs', ended.message)  # these are too few
        self.assertEqual(ended.names['original'], '\n\n'.join(3 * ['A.', 'B.\n\nb', 'C.']))

    def test_stages(self):
        """From the pretrained weights, and from scratch as gpt.py does; the table is exact."""
        more = '--max_iters=20 --dropout=0 --finetune_learning_rate=0.02 --top_k=1'
        first = run(SCRIPT, more, folder_with(OVERFITS))
        names, lines, found = first.names, losses(first.out), table(first.out)
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            names['sample'](names['finetuned'], 40)
        self.assertEqual(sample(first.out), sample(screen.getvalue()))
        self.assertEqual(losses(run('gpt.py', more, folder_with(OVERFITS)).out), lines[8:])
        for i, (stage, part) in enumerate(zip(found, (lines[:3], lines[3:8], lines[8:]))):
            best = load(first, f'{stage}_gpt')['best']
            for name, p in names[stage].state_dict().items():
                self.assertTrue(torch.equal(p, best[name]), name)
            self.assertEqual(found[stage][min(i, 1)], f'{min(loss for *_, loss in part):.4f}')
            exact = [evaluate(names, names[stage], names[text])
                     for text in ('corpus_val', 'val_data')]
            self.assertEqual([f'{loss:.4f}' for loss in exact], found[stage])
        self.assertGreater(lines[7][2], min(loss for *_, loss in lines[3:8]))
        still = table(run(SCRIPT, '--finetune_learning_rate=1e-12').out)
        self.assertEqual(still['pretrained'], still['finetuned'])
        # gpt.py continues with a stage
        only = f'{more} --resume --checkpoint=pretrained_gpt.pt --max_iters=0'
        sampled = run('gpt.py', only, first.folder)
        self.assertIn('fine', sampled.message)
        best = load(first, 'pretrained_gpt')['best']
        for name, p in sampled.names['model'].state_dict().items():
            self.assertTrue(torch.equal(p, best[name]), name)
        (first.folder / 'input.txt').write_text(TEXT, encoding='utf-8')
        self.assertIn('another input.txt', run(SCRIPT, f'{more} --resume', first.folder).message)

    def test_killed(self):
        """Killed before any stage of a run and resumed: the same as never killed. A stage that
        trains again leaves no file of an earlier run behind it."""
        more = '--lora_rank=2'
        for run_again, first in (('--seed=3', False), ('--pretrain_max_iters=16 --resume', True)):
            whole = run(SCRIPT, more)
            earlier = {path.name: path.read_bytes() for path in whole.folder.glob('*.pt')}
            whole = run(SCRIPT, f'{more} {run_again}', whole.folder)
            for i, stage in enumerate(STAGES):
                folder = folder_with(TEXT)
                for name, contents in earlier.items():
                    (folder / name).write_bytes(contents)
                screen = Screen(f'^{stage}: ', sys.exit)
                run(SCRIPT, f'{more} {run_again}', folder, screen=screen)
                self.assertIsNone(screen.action)  # it has been called
                if i > 0:
                    self.assertEqual({path.stem for path in folder.glob('*.pt')},
                                     {f'{done}_gpt' for done in STAGES[:i]})
                again = run_again if '--resume' in run_again else f'{run_again} --resume'
                resumed = run(SCRIPT, f'{more} {again}', folder)
                if i == 0 and not first:
                    self.assertIn('pretrained_gpt.pt', resumed.message)  # nothing to resume
                else:
                    self.assertTrue(end(resumed) == end(whole))

    def test_interrupted(self):
        """After Ctrl-C in a stage no later one runs; the sample is that of the best so far."""
        for i, stage in enumerate(STAGES):
            screen = Screen(f'^{stage}:.*?^ +6 ', interrupt)
            stopped = run(SCRIPT, '--lora_rank=2', screen=screen)
            names = stopped.names
            self.assertEqual({path.stem for path in stopped.folder.glob('*.pt')},
                             {f'{one}_gpt' for one in STAGES[:i + 1]})
            self.assertEqual(table(stopped.out), {})
            self.assertEqual(len(sample(stopped.out)), 41)
            best = load(stopped, f'{STAGES[min(i, 1)]}_gpt')['best']
            for name, p in names['finetuned'].state_dict().items():
                self.assertTrue(torch.equal(p, best[name]), name)
            # killed again, before it saves again
            screen = Screen(f'^loaded {stage}_gpt.pt.*?^ +7 ', sys.exit)
            run(SCRIPT, '--lora_rank=2 --resume', stopped.folder, screen=screen)
            self.assertTrue((stopped.folder / f'{stage}_gpt.pt').exists())

    def test_lora(self):
        """At first it changes nothing; only A and B are learned; what is evaluated is W + B A."""
        trained = run(SCRIPT, '--lora_rank=2 --lora_learning_rate=0.02 --dropout=0')
        names = trained.names
        self.assertRegex(trained.out, r'\nlora: 2,048 trainable parameters\n')
        before, after = load(trained, 'pretrained_gpt')['best'], load(trained, 'lora_gpt')['best']
        model, merged = names['GPT']().eval(), names['GPT']().eval()
        model.load_state_dict(before)
        idx = torch.arange(11)[None]
        logits = model(idx)[0]
        names['add_lora'](model, 2)
        self.assertTrue(torch.equal(model(idx)[0], logits))
        model.load_state_dict(after)
        self.assertFalse(torch.equal(model(idx)[0], logits))
        for name, p in merged.named_parameters():
            self.assertTrue(torch.equal(after[name], before[name]), name)
            p.data = after[name]
            if '.c_' in name:
                layer = name.removesuffix('weight')
                p.data = p + after[layer + 'B'] @ after[layer + 'A']
        torch.testing.assert_close(merged(idx)[0], model(idx)[0])
        loss = evaluate(names, merged, names['val_data'])
        self.assertAlmostEqual(float(table(trained.out)['lora'][1]), loss, delta=2e-4)
