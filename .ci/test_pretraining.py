"""pretrain_finetune.py: the corpus, its stages, LoRA."""
import os, re, unittest
from unittest import mock
import numpy as np
import torch
from common import (OVERFITS, TEXT, UNTRAINED, Screen, Server, evaluate, folder_with, interrupt,
                    kill, load, losses, run, same_end, sample)

SCRIPT = 'pretrain_finetune.py'
STAGES = 'pretrained', 'finetuned', 'scratch', 'lora'

def table(out):
    """{stage: (loss on the corpus, loss on input.txt)} as printed."""
    rows = re.findall(r'^(pretrained|finetuned|scratch|lora) +(\S+) +(\S+)$', out, re.M)
    return {stage: losses for stage, *losses in rows}

class Pretraining(unittest.TestCase):
    def test_characters(self):
        """The corpus comes in the characters of input.txt; what is like none is dropped."""
        rows = [  # input.txt, corpus, what becomes of it
            ('"to be" - or not \'tis o', '“to” be—nót\u00a0‘tis’\t’s☃∑',
             '"to" be-not \'tis\' \'s'), ('“—é"', '“—é”', '“—é"'),
            ('to be-or\n', 'ﬆ–10…\r\nTo be', 't-\no be'),
            ("it's\n", 'it is "so“', "it is 's'"), ('to be\n', 'to be\n', 'to be\n')]
        for text, corpus, converted in rows:
            folder = folder_with((text + ' \n') * 200)
            (folder / 'odd.txt').write_text((corpus + '\n') * 200, encoding='utf-8', newline='')
            names = run(SCRIPT, f'{UNTRAINED} --corpus=odd.txt', folder).names
            data = torch.cat((names['corpus_train'], names['corpus_val']))
            self.assertEqual(names['decode'](data.tolist()), (converted + '\n') * 200)
            self.assertEqual(len(names['corpus_val']), len(data) // 10)
        for corpus, message in (('ДОМ, дом\n' * 999, 'most of its characters'),
                                ('to be\n' * 20, 'odd.txt needs 170 characters')):
            (folder / 'odd.txt').write_text(corpus, encoding='utf-8')
            self.assertIn(message, run(SCRIPT, f'{UNTRAINED} --corpus=odd.txt', folder).message)

    @mock.patch('tiktoken.get_encoding')
    def test_corpus(self, encoding):
        """A text or a shard of tokens is fetched once; a damaged one leaves nothing behind."""
        def fetch(corpus, folder=None):
            return run(SCRIPT, f'{UNTRAINED} --megabytes=1 --corpus={corpus}',
                       folder or folder_with(TEXT))

        # a token is a byte
        encoding.return_value.decode = lambda tokens: bytes(tokens).decode(errors='replace')
        text = '\n\nThe king sees – naïve – cats.\n'.encode() * 40000
        tokens = np.frombuffer(b'<|endoftext|>' + text[2:], np.uint8).astype('<u2').tobytes()
        header, short = (np.array([20240520, 1, n] + 253 * [0], '<i4').tobytes()
                         for n in (len(tokens) // 2, 9000))
        fineweb = '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_train_000001.bin'
        good = {fineweb: header + tokens, '/good.txt': text, '/small.bin': short + tokens[:18000]}
        damaged = (  # part of the message, path, what the server sends
            ('incomplete', '/cut.bin', header + tokens[:90000]),
            ('incomplete', '/few.bin', short + tokens[:17998]),
            ('tokens', '/magic.bin', b'7' + header[1:] + tokens), ('404', '/none.bin', None),
            ('IncompleteRead', '/broken.bin', header + tokens),
            ('IncompleteRead', '/broken.txt', text))
        bodies = good | {path: body for _, path, body in damaged if body}
        with Server(bodies, ['/broken.bin', '/broken.txt']) as server:
            for corpus, size in (('fineweb', 250_000 - 11), ('http://a.org/good.txt', 10**6),
                                 ('http://a.org/small.bin', 9000 - 11)):
                folder = folder_with(TEXT)
                for _ in range(2):  # the second time the file is there
                    names = fetch(corpus, folder).names
                kept = next(folder.glob('*_1MB.txt')).read_text(encoding='utf-8')
                self.assertEqual(kept.rstrip('\ufffd'), text[:size].decode(errors='ignore'))
                self.assertEqual(names['corpus_text'], kept)
            self.assertEqual(server.asked, [*good])
            for message, path, _ in damaged:
                failed = fetch('http://a.org' + path)
                self.assertIn(message, failed.message)
                self.assertEqual(sorted(os.listdir(failed.folder)), ['corpus.txt', 'input.txt'])
        with server.patch:  # nobody answers any more
            offline = fetch('fineweb')
        self.assertEqual(offline.message, 'fine')
        self.assertEqual(len(offline.names['corpus_text']), 10**6)  # docstrings
        self.assertEqual(len([*offline.folder.glob('*.txt')]), 2)

    def test_docstrings(self):
        """They are those of Python and PyTorch, without tests and other packages."""
        root = folder_with(None) / '[a]'
        root.mkdir()
        source = '"""A."""\nclass C:\n    r"""B.\n\n    b"""\n    def f():\n        """C."""\n'
        for path in 'os.py', 'a/a.py', 'site-packages/b.py', 'test/c.py', 'data.txt':
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_text(source)
        docstrings = run(SCRIPT, UNTRAINED).names['docstrings']
        with (mock.patch('sysconfig.get_path', return_value=str(root)),
              mock.patch.object(torch, '__path__', [str(root / 'a')])):
            self.assertEqual(docstrings(), '\n\n'.join(3 * ['A.', 'B.\n\nb', 'C.']))

    def test_stages(self):
        """From the pretrained weights, and from scratch as gpt.py does; the table says what the
        best weights of each stage do, and gpt.py can continue them."""
        more = '--max_iters=20 --dropout=0'
        first = run(SCRIPT, more, folder_with(OVERFITS))
        names, lines, found = first.names, losses(first.out), table(first.out)
        best = load(first, 'finetuned_gpt')['best']
        for name, p in names['model'].state_dict().items():  # which writes the sample
            self.assertTrue(torch.equal(p, best[name]), name)
        self.assertEqual(len(sample(first.out)), 41)
        classic = run('gpt.py', more, folder_with(OVERFITS))
        self.assertEqual(losses(classic.out), lines[8:])
        for i, (stage, part) in enumerate(zip(found, (lines[:3], lines[3:8], lines[8:]))):
            best = min(loss for _, _, loss in part)
            self.assertEqual(found[stage][min(i, 1)], f'{best:.4f}')
            names['model'].load_state_dict(load(first, f'{stage}_gpt')['best'])
            for text, loss in zip(('corpus_val', 'val_data'), found[stage]):
                self.assertEqual(f'{evaluate(names, names["model"], names[text]):.4f}', loss)
            again = run('gpt.py', f'--resume --checkpoint={stage}_gpt.pt --max_iters=22',
                        first.folder)
            self.assertEqual(again.message, 'fine')
            self.assertIn(f'best val loss {best:.4f}' if i else '', again.out)
        self.assertGreater(lines[7][2], min(loss for _, _, loss in lines[3:8]))
        still = run(SCRIPT, '--finetune_learning_rate=1e-12')
        self.assertEqual(*map(table(still.out).get, ('pretrained', 'finetuned')))

    def test_resume(self):
        """Killed or interrupted in any stage and resumed: the end is that of a whole run."""
        more = '--lora_rank=2'
        whole = run(SCRIPT, more)
        for stage in STAGES:
            for pattern, action in ('^step 8:', kill), ('^ +6 ', interrupt):
                with self.subTest(f'{stage} {pattern}'):
                    screen = Screen(rf'^{stage}:.*?{pattern}', action)
                    stopped = run(SCRIPT, more, screen=screen)
                    self.assertEqual(stopped.message, 'killed' if action == kill else 'fine')
                    later = STAGES[STAGES.index(stage) + 1:]
                    self.assertFalse([path for path in stopped.folder.glob('*.pt')
                                      if path.name.startswith(later)])
                    resumed = run(SCRIPT, f'{more} --resume', stopped.folder)
                    self.assertEqual(table(resumed.out), table(whole.out))
                    for name in STAGES:
                        same_end(self, resumed, whole, f'{name}_gpt')
        kept = {path.name: path.read_bytes() for path in whole.folder.glob('*_gpt.pt')}
        run(SCRIPT, f'{more} --seed=3', whole.folder)  # a new run keeps the old one's files
        for name, contents in kept.items():
            self.assertEqual((whole.folder / f'{name}.old').read_bytes(), contents)

    def test_refused(self):
        """Weights of another text or size are not resumed."""
        folder = run(SCRIPT).folder
        self.assertIn("'n_layer': 2", run(SCRIPT, '--resume --n_layer=3', folder).message)
        (folder / 'input.txt').write_text(OVERFITS)
        self.assertIn('another input.txt', run(SCRIPT, '--resume', folder).message)

    def test_lora(self):
        """At first it changes nothing; then only A and B are learned, and the model that is
        evaluated has W + B A."""
        trained = run(SCRIPT, '--lora_rank=2 --lora_learning_rate=0.02 --dropout=0')
        names = trained.names
        self.assertRegex(trained.out, r'\nlora: 2,048 of [\d,]+ parameters are trainable\n')
        before, after = load(trained, 'pretrained_gpt')['best'], load(trained, 'lora_gpt')['best']
        model = names['GPT']().eval()
        model.load_state_dict(before)
        idx = torch.arange(11)[None]
        logits = model(idx)[0]
        names['add_lora'](model, 2)
        self.assertTrue(torch.equal(model(idx)[0], logits))
        model.load_state_dict(after)
        self.assertFalse(torch.equal(model(idx)[0], logits))
        merged = names['GPT']().eval()
        for name, p in merged.named_parameters():
            self.assertTrue(torch.equal(after[name], before[name]), name)
            p.data = after[name]
            if '.c_' in name:
                layer = name.removesuffix('weight')
                p.data = p + after[layer + 'B'] @ after[layer + 'A']
                change = torch.linalg.matrix_rank(p - before[name], rtol=1e-3).item()
                self.assertEqual(change, 2, name)
        torch.testing.assert_close(merged(idx)[0], model(idx)[0])
        loss = evaluate(names, merged, names['val_data'])
        self.assertAlmostEqual(float(table(trained.out)['lora'][1]), loss, delta=2e-4)
