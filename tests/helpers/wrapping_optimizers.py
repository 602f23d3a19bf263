"""Stand-ins of the shapes in which libraries wrap an optimizer."""

import torch
from torch.optim import Optimizer


class Accelerated(Optimizer):
    """Accelerate's: never calls `Optimizer.__init__`, so it has no registries of hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def train(self):
        """As Accelerate's has."""

    def eval(self):
        """As Accelerate's has."""

    def __getstate__(self):
        return vars(self)

    def __setstate__(self, state):
        vars(self).update(state)


class Strategy:
    """Calls the step of the optimizer itself, as Lightning's do."""

    def optimizer_step(self, optimizer, closure):
        return optimizer.step(closure)


class LightningLike:
    """Lightning's: takes on the attributes and the class of the optimizer inside."""

    def __init__(self, optimizer):
        vars(self).update({k: v for k, v in vars(optimizer).items() if k != "step"})
        kinds = (LightningLike, type(optimizer))
        self.__class__ = type("Lightning" + type(optimizer).__name__, kinds, {})
        self._optimizer, self._strategy = optimizer, Strategy()

    def step(self, closure=None):
        return self._strategy.optimizer_step(self._optimizer, closure)


class Sam(Optimizer):
    """SAM in two steps, of which neither is `step`."""

    def __init__(self, params, name="base_optimizer", exact=True, **options):
        super().__init__(params, {"rho": 0.05, **options})
        base = torch.optim.SGD(self.param_groups, **options)
        setattr(self, name, {"inner": [base]} if name == "several" else base)
        self.inner, self.exact = (lambda: base), exact
        self.param_groups = base.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"old": p.clone(), "change": 0.3 * p.grad / p.grad.norm()}
            p.add_(self.state[p]["change"])

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            if self.exact:
                p.data = self.state[p]["old"]
            else:
                p.sub_(self.state[p]["change"])
        self.inner().step()


class Alone(Optimizer):
    """Moves the weights itself, in a method that is not `step`."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def advance(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])

    def step(self, closure=None):
        self.advance()


class Pulling:
    """Pulls weights back to slow ones after the step inside."""

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        for p in self.param_groups[0]["params"]:
            slow = self.slow.setdefault(p, torch.zeros_like(p))
            p.copy_(slow.add_(0.3 * (p - slow)))


class Lookahead(Pulling, Optimizer):
    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.param_groups, self.slow = optimizer, optimizer.param_groups, {}


class BareLookahead(Pulling, Optimizer):
    """As in torch-optimizer: without `Optimizer.__init__`, so its own step runs no hooks."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.slow = optimizer, optimizer.param_groups, {}


class ScheduleFree(torch.optim.SGD):
    """Weights are swapped between two points in `train()` and `eval()`."""

    def train(self):
        self._move(1.0)

    def eval(self):
        self._move(-1.0)

    @torch.no_grad()
    def _move(self, by):
        for p in self.param_groups[0]["params"]:
            p.add_(by)
