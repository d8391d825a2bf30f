"""addition_gpt.py: what it learns from, what it writes, and what it counts."""
import unittest
import torch
import torch.nn as nn
from torch.nn import functional as F
from common import Screen, call, run, sample, untrained
from test_models import reference

SCRIPT = 'addition_gpt.py'
PLAIN = '--reverse=False --order=plain --position=learned'  # the sum in reading order

class Addition(unittest.TestCase):
    def test_batch(self):
        """Rows are sums; the targets are their answers. Problems held out become 0+0."""
        for n, settings in (2, PLAIN), (5, ''):
            names = run(SCRIPT, f'{settings} --max_iters=0 --batch_size=9000 --n_digits={n} '
                                '--test_digits=5 --block_size=17 --problem=1+2').names
            zeros = 0
            for row, target in zip(*(z.tolist() for z in call(names, 'get_batch'))):
                a, b = map(int, names['decode'](row).split('=')[0].split('+'))
                answer = f'{a + b:0{n + 1}}'[::-1 if n == 5 else 1]
                text = names['encode'](f'{a:0{n}}+{b:0{n}}={answer}')
                self.assertEqual(row, text[:-1])
                self.assertEqual(target, [-1] * (2 * n + 1) + text[2 * n + 2:])
                self.assertNotEqual((a * a + b * b) % 101, 1)
                zeros += a + b == 0
            self.assertTrue(50 < zeros < 130, zeros)
            for a, b in names['val_problems'].tolist():
                a, b = (int(''.join(map(str, number))) for number in (a, b))
                self.assertEqual((a * a + b * b) % 101, 1)

    def test_columns(self):
        """The logits are those of the formulas, where tokens see two columns (if coupled)."""
        for settings in '', '--layer_norm=False --n_head=4', '--n_layer=2', '--position=learned':
            names = untrained(SCRIPT, f'--n_layer=1 --block_size=30 {settings}')
            model = names['model']
            norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
            self.assertEqual(norms, 0 if 'norm' in settings else 1 + 2 * names['n_layer'])
            for L in 2, 5:
                row = call(names, 'write', problems=torch.randint(10, (4, 2, L)))
                for T in 3 * L + 3, 2 * L + 2, L + 1:
                    logits, _ = model(row[:, :T])
                    expected = reference(names, model, row[:, :T])
                    torch.testing.assert_close(logits, expected, atol=6e-5, rtol=6e-5)

    def perfect(self, settings, spoiled=None):
        """What the script writes at its end if its model is always right, but for one problem."""
        def forward(idx):
            L = idx[0].tolist().index(10)
            problems = torch.stack((idx[:, :L], idx[:, L + 1:2 * L + 1]), dim=1)
            rows = call(names, 'write', problems=problems)[:, 1:idx.shape[1] + 1]
            wrong = torch.tensor([p == spoiled for p in problems.flatten(1).tolist()])
            rows[wrong, 3 * L + 1:] = 7  # the last token of the answer
            return F.one_hot(rows, 12).float(), None

        names = {}
        screen = Screen('-{64}\n', lambda: setattr(names['model'], 'forward', forward))
        return sample(run(SCRIPT, f'{settings} --max_iters=0', names=names, screen=screen).out)

    def test_proof(self):
        """Of a model that is always right it counts 0 wrong; with one answer spoiled, 1."""
        for n, spoiled, wrong, lines in (
                (2, [99], 0, ['2 digits: 0 wrong of 10,000,', ' 20 digits: 0 wrong of 477, 0']),
                (2, [4, 3, 5, 8], 1, ['2 digits: 1 wrong of 10,000,', '=701 (wrong: it is 101']),
                (1, [1, 0], 1, ['1 digits: 1 wrong of 100,', '  1 digits: 491 wrong of 981, 0'])):
            out = self.perfect(f'--n_digits={n} --test_digits=20', spoiled)
            for line in lines:
                self.assertIn(line, out)
            self.assertEqual((out.count('(wrong: it is '), out.count('(correct)')), (wrong, 2))
        names = run(SCRIPT).names
        problems = names['carry_all_along'](names['held_out_problems'](7, 500))
        self.assertGreater(len(problems), 400)
        self.assertTrue(torch.equal(problems, problems.clamp(0, 9)))
        sums = problems.sum(dim=1)
        self.assertTrue((sums[:, :-1] == 9).all() and (sums[:, -1] > 9).all())

    def test_answers(self):
        """One pass counts what greedy decoding gets right; --problem answers and judges."""
        for settings in '', PLAIN:
            for problem, answer in (('12+34', '12+34=46'), ('0+000', '0+0=0'),
                                    ('1234+9', '1234+9=1243')):
                out = self.perfect(f'{settings} --problem={problem}')
                self.assertEqual(out, f'{answer} (correct)\n')
            names = run(SCRIPT, f'{settings} --max_iters=150 --warmup_iters=20 --n_layer=1 '
                                '--eval_interval=999 --batch_size=64 --n_embd=16').names
            model = names['model']
            problems = torch.randint(10, (999, 2, 2))
            rows = call(names, 'write', problems=problems)
            right, loss = names['check'](problems)
            out = model.generate(rows[:, :6], 3)
            self.assertTrue(torch.equal(right, (out == rows).all(dim=1)))
            self.assertTrue(50 < right.sum() < 950, right.sum())
            y = F.pad(rows[:, 6:], (5, 0), value=-1)
            torch.testing.assert_close(loss.mean(), model(rows[:, :-1], y)[1])
