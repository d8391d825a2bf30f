"""pretrain_finetune.py: the corpus, its stages, LoRA."""
import os, re, unittest, urllib.error
from unittest import mock
import numpy as np
import torch
from common import (OVERFITS, STAGES, TEXT, UNTRAINED, evaluate, folder_with, load, losses, run,
                    sample, serve)

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
        for corpus, message in (('ДОМ, дом\n' * 999, 'most of its characters'),
                                ('to be\n' * 20, 'odd.txt needs 170 characters')):
            (folder / 'odd.txt').write_text(corpus, encoding='utf-8')
            self.assertIn(message, run(SCRIPT, f'{UNTRAINED} --corpus=odd.txt', folder).message)

    @mock.patch('tiktoken.get_encoding')
    def test_corpus(self, encoding):
        """A text or a shard of tokens is fetched once; a damaged one leaves nothing behind."""
        # a token is a byte
        encoding.return_value.decode = lambda tokens: bytes(tokens).decode(errors='replace')
        text = '\n\nThe king sees – naïve – cats.\n'.encode() * 40000
        tokens = np.frombuffer(b'<|endoftext|>' + text[2:], np.uint8).astype('<u2').tobytes()
        header, short = (np.array([20240520, 1, n] + 253 * [0], '<i4').tobytes()
                         for n in (len(tokens) // 2, 9000))
        files = {  # path: contents, how many bytes of the text are read or why none
            FINEWEB: (header + tokens, 250_000 - 11), '/good.txt': (text, 10**6),
            '/small.bin': (short + tokens[:18000], 9000 - 11),
            '/cut.bin': (header + tokens[:90000], 'incomplete'),
            '/few.bin': (short + tokens[:17998], 'incomplete'),
            '/magic.bin': (b'7' + header[1:] + tokens, 'tokens'),
            '/broken.txt': (text, 'IncompleteRead'), '/none.bin': (None, '404')}
        more = f'{UNTRAINED} --megabytes=1 --corpus='
        bodies = {path: body for path, (body, _) in files.items() if body}
        with serve(bodies, ['/broken.txt']) as (_, asked):
            for path, (_, result) in files.items():
                corpus = 'fineweb' if path == FINEWEB else f'https://a.org{path}'
                first = run(SCRIPT, more + corpus)
                if isinstance(result, str):
                    self.assertIn(result, first.message)
                    self.assertEqual({*os.listdir(first.folder)}, {'corpus.txt', 'input.txt'})
                else:
                    again = run(SCRIPT, more + corpus, first.folder)
                    kept = next(first.folder.glob('*_1MB.txt')).read_text(encoding='utf-8')
                    self.assertEqual(kept.rstrip('\ufffd'), text[:result].decode(errors='ignore'))
                    self.assertEqual(again.names['corpus_text'], kept)
            self.assertEqual(asked, [*files])

    def test_offline(self):
        """The docstrings of Python and PyTorch, without tests and other packages, instead."""
        root = folder_with(None) / 'tests[a]'
        for path in 'os.py', 'a/a.py', 'site-packages/b.py', 'test/c.py', 'data.txt':
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text('"""A."""\nclass C:\n    r"""B.\n\n    b"""\n    """C."""\n')
        with (mock.patch('urllib.request.urlopen', side_effect=urllib.error.URLError('offline')),
              mock.patch('sysconfig.get_path', return_value=str(root)),
              mock.patch.object(torch, '__path__', [str(root / 'a')])):
            ended = run(SCRIPT, '--corpus=fineweb')
        self.assertIn('docstrings', ended.message)  # which are too few here
        self.assertEqual(ended.names['corpus_text'], '\n\n'.join(3 * ['A.', 'B.\n\nb', 'C.']))

    def test_stages(self):
        """From the pretrained weights, and from scratch as gpt.py does; the table is exact."""
        more = '--max_iters=20 --dropout=0 --warmup_ratio=0.05'  # a step, as pretrain_finetune.py
        first = run(SCRIPT, more, folder_with(OVERFITS))
        names, lines, found = first.names, losses(first.out), table(first.out)
        model, best = names['model'], load(first, 'finetuned_gpt')['best']
        for name, p in model.state_dict().items():  # which writes the sample
            self.assertTrue(torch.equal(p, best[name]), name)
        self.assertEqual(len(sample(first.out)), 41)
        self.assertEqual(losses(run('gpt.py', more, folder_with(OVERFITS)).out), lines[8:])
        for i, (stage, part) in enumerate(zip(found, (lines[:3], lines[3:8], lines[8:]))):
            best = min(loss for *_, loss in part)
            self.assertEqual(found[stage][min(i, 1)], f'{best:.4f}')
            model.load_state_dict(load(first, f'{stage}_gpt')['best'])
            exact = [evaluate(names, model, names[text]) for text in ('corpus_val', 'val_data')]
            self.assertEqual([f'{loss:.4f}' for loss in exact], found[stage])
        self.assertGreater(lines[7][2], min(loss for *_, loss in lines[3:8]))
        still = table(run(SCRIPT, '--finetune_learning_rate=1e-12').out)
        self.assertEqual(still['pretrained'], still['finetuned'])
        (first.folder / 'input.txt').write_text(TEXT, encoding='utf-8')
        self.assertIn('another input.txt', run(SCRIPT, f'{more} --resume', first.folder).message)

    def test_lora(self):
        """At first it changes nothing; only A and B are learned; what is evaluated is W + B A."""
        trained = run(SCRIPT, '--lora_rank=2 --lora_learning_rate=0.02 --dropout=0')
        names = trained.names
        self.assertRegex(trained.out, r'\nlora: 2,048 of [\d,]+ parameters are trainable\n')
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
