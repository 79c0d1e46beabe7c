"""AdamW, and the base of our optimizers: torch's without what imports its compiler."""

import torch


class Uncompiled(torch.optim.Optimizer):
    """torch's optimizer without its guards for torch.compile, which import the compiler.

    That takes two seconds of every start.
    """

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__


class AdamW(Uncompiled, torch.optim.AdamW):
    """Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2."""

    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)
