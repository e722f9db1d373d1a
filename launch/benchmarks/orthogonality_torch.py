"""Worker: PyTorch's ways to orthonormal matrices. `python orthogonality_torch.py CORE...`"""

import sys

from orthogonality import restrict, serve

if __name__ == "__main__":
    cores = restrict(sys.argv[1:])
    import importlib.metadata

    import geotorch
    import torch
    from pogo import POGO, base
    from torch.nn.utils import parametrizations

    torch.set_num_threads(cores)
    PARAMETRIZATIONS = {
        "geotorch": geotorch.orthogonal,
        "parametrizations.orthogonal": parametrizations.orthogonal,
    }

    class Holder(torch.nn.Module):
        def __init__(self, start):
            super().__init__()
            self.weight = torch.nn.Parameter(start.clone())

    def make(method, start, target, rate):
        start, target = torch.from_numpy(start), torch.from_numpy(target)
        module = Holder(start)
        if method == "pogo-torch":
            optimizer = POGO([module.weight], base.SGD(), rate, rows=False)
        else:
            PARAMETRIZATIONS[method](module, "weight")
            module.weight = start
            optimizer = torch.optim.SGD(module.parameters(), lr=rate)

        def step():
            optimizer.zero_grad()
            loss = 0.5 * ((module.weight - target) ** 2).sum()
            loss.backward()
            optimizer.step()

        return step, lambda: module.weight.detach().numpy()

    names = ("torch", "geotorch", "pogo-torch")
    serve(make, {name: importlib.metadata.version(name) for name in names})
