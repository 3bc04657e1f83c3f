"""The Inception-v3 of Fréchet distances in torch: a transcription of pytorch-fid's, of any width.

torchvision's blocks as published (Conv2d without bias, BatchNorm2d of eps 0.001, ReLU), with the
changes of pytorch-fid: average pools without what is padded, and a maximum in the last block.
"""


def inception(torch, d=16, classes=11, seed=1):
    nn, F = torch.nn, torch.nn.functional

    class Conv(nn.Module):
        def __init__(self, i, o, k=1, s=1, p=0):
            super().__init__()
            self.conv = nn.Conv2d(i, o, k, s, p, bias=False)
            self.bn = nn.BatchNorm2d(o, eps=0.001)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    class Block(nn.Module):
        """Branches by name; each is a list of chains' layers that `forward` is told."""

        def __init__(self, kind, pool, **layers):
            super().__init__()
            self.kind, self.pool = kind, pool
            for name, arguments in layers.items():
                setattr(self, name, Conv(*arguments))

        def run(self, x, *names):
            for name in names:
                x = getattr(self, name)(x)
            return x

        def pooled(self, x):
            if self.pool == "max":
                return F.max_pool2d(x, 3, 1, 1)
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

        def forward(self, x):
            run = self.run
            if self.kind == "A":
                return torch.cat(
                    [
                        run(x, "branch1x1"),
                        run(x, "branch5x5_1", "branch5x5_2"),
                        run(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                        run(self.pooled(x), "branch_pool"),
                    ],
                    1,
                )
            if self.kind == "B":
                three = run(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
                return torch.cat([run(x, "branch3x3"), three, F.max_pool2d(x, 3, 2)], 1)
            if self.kind == "C":
                return torch.cat(
                    [
                        run(x, "branch1x1"),
                        run(x, *(f"branch7x7_{n}" for n in (1, 2, 3))),
                        run(x, *(f"branch7x7dbl_{n}" for n in (1, 2, 3, 4, 5))),
                        run(self.pooled(x), "branch_pool"),
                    ],
                    1,
                )
            if self.kind == "D":
                seven = run(x, *(f"branch7x7x3_{n}" for n in (1, 2, 3, 4)))
                three = run(x, "branch3x3_1", "branch3x3_2")
                return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
            three, twice = run(x, "branch3x3_1"), run(x, "branch3x3dbl_1", "branch3x3dbl_2")
            return torch.cat(
                [
                    run(x, "branch1x1"),
                    run(three, "branch3x3_2a"),
                    run(three, "branch3x3_2b"),
                    run(twice, "branch3x3dbl_3a"),
                    run(twice, "branch3x3dbl_3b"),
                    run(self.pooled(x), "branch_pool"),
                ],
                1,
            )

    def a(i, pool):
        return Block(
            "A",
            "mean",
            branch1x1=(i, 64 // d),
            branch5x5_1=(i, 48 // d),
            branch5x5_2=(48 // d, 64 // d, 5, 1, 2),
            branch3x3dbl_1=(i, 64 // d),
            branch3x3dbl_2=(64 // d, 96 // d, 3, 1, 1),
            branch3x3dbl_3=(96 // d, 96 // d, 3, 1, 1),
            branch_pool=(i, pool // d),
        )

    def c(i, c7):
        row, column, m, o = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0)), c7 // d, 192 // d
        return Block(
            "C",
            "mean",
            branch1x1=(i, o),
            branch7x7_1=(i, m),
            branch7x7_2=(m, m, *row),
            branch7x7_3=(m, o, *column),
            branch7x7dbl_1=(i, m),
            branch7x7dbl_2=(m, m, *column),
            branch7x7dbl_3=(m, m, *row),
            branch7x7dbl_4=(m, m, *column),
            branch7x7dbl_5=(m, o, *row),
            branch_pool=(i, o),
        )

    def e(i, pool):
        row, column, m = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0)), 384 // d
        return Block(
            "E",
            pool,
            branch1x1=(i, 320 // d),
            branch3x3_1=(i, m),
            branch3x3_2a=(m, m, *row),
            branch3x3_2b=(m, m, *column),
            branch3x3dbl_1=(i, 448 // d),
            branch3x3dbl_2=(448 // d, m, 3, 1, 1),
            branch3x3dbl_3a=(m, m, *row),
            branch3x3dbl_3b=(m, m, *column),
            branch_pool=(i, 192 // d),
        )

    b = Block(
        "B",
        "",
        branch3x3=(288 // d, 384 // d, 3, 2),
        branch3x3dbl_1=(288 // d, 64 // d),
        branch3x3dbl_2=(64 // d, 96 // d, 3, 1, 1),
        branch3x3dbl_3=(96 // d, 96 // d, 3, 2),
    )
    dd = Block(
        "D",
        "",
        branch3x3_1=(768 // d, 192 // d),
        branch3x3_2=(192 // d, 320 // d, 3, 2),
        branch7x7x3_1=(768 // d, 192 // d),
        branch7x7x3_2=(192 // d, 192 // d, (1, 7), 1, (0, 3)),
        branch7x7x3_3=(192 // d, 192 // d, (7, 1), 1, (3, 0)),
        branch7x7x3_4=(192 // d, 192 // d, 3, 2),
    )

    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.Conv2d_1a_3x3 = Conv(3, 32 // d, 3, 2)
            self.Conv2d_2a_3x3 = Conv(32 // d, 32 // d, 3)
            self.Conv2d_2b_3x3 = Conv(32 // d, 64 // d, 3, 1, 1)
            self.Conv2d_3b_1x1 = Conv(64 // d, 80 // d)
            self.Conv2d_4a_3x3 = Conv(80 // d, 192 // d, 3)
            self.Mixed_5b = a(192 // d, 32)
            self.Mixed_5c, self.Mixed_5d = a(256 // d, 64), a(288 // d, 64)
            self.Mixed_6a = b
            self.Mixed_6b, self.Mixed_6c = c(768 // d, 128), c(768 // d, 160)
            self.Mixed_6d, self.Mixed_6e = c(768 // d, 160), c(768 // d, 192)
            self.Mixed_7a = dd
            self.Mixed_7b, self.Mixed_7c = e(1280 // d, "mean"), e(2048 // d, "max")
            self.fc = nn.Linear(2048 // d, classes)

        def forward(self, x):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, 2)
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
            for letter in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
                x = getattr(self, f"Mixed_{letter}")(x)
            return F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]

    module = Inception()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.ndim > 1:
                value.normal_(0, (1.6 / value[0].numel()) ** 0.5, generator=generator)
            elif name.endswith(("running_var", "bn.weight")):
                value.uniform_(0.7, 1.4, generator=generator)
            elif value.ndim:
                value.normal_(0, 0.1, generator=generator)
    return module.eval()
