"""addition_gpt.py: what it learns from, what it writes, and what it counts."""
import unittest
import torch
from torch.nn import functional as F
from common import Screen, run, sample, untrained
from test_models import reference

SCRIPT = 'addition_gpt.py'
ORDERS = {  # how the sum of 78 and 45 is written
    '--order=reversed': '321', '--order=plain --position=learned': '123',
    '--order=scratchpad --position=learned --block_size=40': '321=123'}

class Addition(unittest.TestCase):
    def test_batch(self):
        """Rows are sums; the targets are their answers. Problems held out become 0+0."""
        for (settings, _), n in zip(ORDERS.items(), (5, 2, 3)):
            names = run(SCRIPT, f'{settings} --max_iters=0 --batch_size=9000 --n_digits={n} '
                                '--test_digits=5 --block_size=24 --problem=1+2').names
            zeros = 0
            for row, target in zip(*(z.tolist() for z in names['get_batch']())):
                a, b = map(int, names['decode'](row).split('=')[0].split('+'))
                plain = f'{a + b:0{n + 1}}'
                answer = {'plain': plain, 'reversed': plain[::-1],
                          'scratchpad': f'{plain[::-1]}={plain}'}[names['order']]
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
        for settings in '', '--n_head=4', '--n_layer=2', '--position=learned':
            names = untrained(SCRIPT, f'--n_layer=1 --block_size=30 {settings}')
            model = names['model']
            for L in 2, 5:
                row = names['rows_of'](torch.randint(10, (4, 2, L)))
                for T in 3 * L + 3, 2 * L + 2, L + 1:
                    logits, _ = model(row[:, :T], L)
                    expected = reference(names, model, row[:, :T])
                    torch.testing.assert_close(logits, expected, atol=6e-5, rtol=6e-5)

    def perfect(self, settings, spoiled=None, place=-1):
        """What the script writes at its end if its model is always right, but for one token of
        one problem."""
        def forward(idx, L, targets=None):
            problems = torch.stack((idx[:, :L], idx[:, L + 1:2 * L + 1]), dim=1)
            rows = names['rows_of'](problems)[:, 1:]
            wrong = torch.tensor([p == spoiled for p in problems.flatten(1).tolist()],
                                 dtype=torch.bool)
            rows[wrong, place % rows.shape[1]] = 7
            return F.one_hot(rows[:, :idx.shape[1]], 12).float(), torch.tensor(0.0)

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
        # in the scratchpad, and in the answer behind it
        settings = '--order=scratchpad --position=learned --block_size=40 --n_digits=2'
        for place, wrong in (5, 0), (-1, 1):
            out = self.perfect(settings, [4, 3, 5, 8], place)
            self.assertIn(f'2 digits: {wrong} wrong of 10,000', out)
        self.assertIn('43+58=101=107 (wrong: it is 101)', out)
        names = run(SCRIPT).names
        problems = names['carry_all_along'](names['held_out_problems'](7, 500))
        self.assertGreater(len(problems), 400)
        self.assertTrue(torch.equal(problems, problems.clamp(0, 9)))
        sums = problems.sum(dim=1)
        self.assertTrue((sums[:, :-1] == 9).all() and (sums[:, -1] > 9).all())

    def test_proof_of_more_digits(self):
        """If more than three digits are trained on, three are proved."""
        out = self.perfect('--n_digits=4 --test_digits=4')
        self.assertIn('all problems of 3 digits: 0 wrong of 1,000,000', out)

    def test_answers(self):
        """Wrong is what greedy decoding gets wrong; --problem answers and judges."""
        for settings, answer in ORDERS.items():
            for problem in '78+45', '0078+45':
                zeros = '0' * (len(problem) - 5)
                written = {'321=123': f'{zeros}78+{zeros}45=321{zeros}={zeros}123'}
                out = self.perfect(f'{settings} --problem={problem}')
                self.assertEqual(out, f'{written.get(answer, "78+45=123")} (correct)\n')
            out = self.perfect(f'{settings} --problem=0+000')
            self.assertRegex(out, r'^(0\+0=0|000\+000=0000=0000) \(correct\)\n$')
            ended = run(SCRIPT, f'{settings} --max_iters=250 --warmup_ratio=0.1 --n_layer=1 '
                                '--eval_interval=999 --batch_size=64 --n_embd=16')
            names = ended.names
            model = names['model']
            _, wrong = names['evaluate'](model, names['val_problems'])
            share = 1 - len(wrong) / len(names['val_problems'])
            self.assertIn(f' {share:.2%} of the held-out problems correct', ended.out)
            problems = torch.randint(10, (2999, 2, 2))  # in two parts
            rows = names['rows_of'](problems)
            loss, wrong = names['evaluate'](model, problems)
            out = model.generate(rows[:, :6], 2, len(answer))
            right = (out[:, -3:] == rows[:, -3:]).all(dim=1)
            self.assertTrue(torch.equal(wrong, problems[~right]))
            self.assertTrue(60 < right.sum() < 2940, right.sum())
            y = F.pad(rows[:, 6:], (5, 0), value=-1)
            self.assertAlmostEqual(loss, model(rows[:, :-1], 2, y)[1].item(), places=5)
