"""A card in pure Python on a CPU, to prove device-correctness where no card is at hand.

Tensors on it say that they are elsewhere and hold real numbers. What mixes devices is refused, as on a GPU; what makes a GPU wait for the host, or the host for a GPU, is counted, and so is what is launched."""
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest, torch
import fastai.torch_core as fc
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device('meta')
# The size of what comes out depends on the numbers, or the host reads the result or an error flag
WAITS = {'_local_scalar_dense', 'nonzero', 'equal', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive', 'bincount', 'repeat_interleave',
         'linalg_cholesky_ex', 'linalg_inv_ex', '_linalg_solve_ex', '_linalg_eigh', '_linalg_svd', 'linalg_qr', 'linalg_lstsq', 'histc', '_linalg_det'}


class OnCard(torch.Tensor):
    "Says that it is on the card; `real_` is a CPU tensor."
    __torch_function__ = torch._C._disabled_torch_function_impl
    @staticmethod
    def __new__(cls, real):
        t = torch.Tensor._make_wrapper_subclass(cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=CARD)
        t.real_ = real
        return t
    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None): return execute(f, args, kwargs or {})
    def as_subclass(self, cls): return self
    def tolist(self): return self.cpu().tolist()
    def __repr__(self, **_): return f'on the card: {self.cpu()}'
    def numpy(self, *args, **kwargs): raise TypeError("a tensor on the card has no numpy(): copy it to the host first")
    def __array__(self, *args, **kwargs): self.numpy()
    def __reduce_ex__(self, proto): # a file holds CPU tensors, as with map_location='cpu'
        real = self.real_.detach()
        if getattr(self, '_is_param', False): real = torch.nn.Parameter(real, self.requires_grad)
        return real.__reduce_ex__(proto)
    def __deepcopy__(self, memo):
        t = OnCard(self.real_.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, '_is_param', False): t._is_param = True
        return memo.setdefault(id(self), t)


def on(o): return isinstance(o, OnCard)
def tell(kind):
    if Card.now: Card.now.events[kind, where()] += 1
def where():
    "The innermost line of the project."
    f = sys._getframe(2)
    while f and '/dglit/' not in f.f_code.co_filename: f = f.f_back
    return f'{f.f_code.co_filename.split("/dglit/")[-1]}:{f.f_code.co_qualname}' if f else 'fastai'


_view = {} # whether an operator gives a view, which launches nothing
def is_view(f):
    if f not in _view: _view[f] = any(r.alias_info is not None and not r.alias_info.is_write for r in f._schema.returns)
    return _view[f]


def execute(f, args, kwargs):
    tensors = [o for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)]
    mine, rest, name = [o for o in tensors if on(o)], [o for o in tensors if not on(o)], f._schema.name[6:]
    to = kwargs.get('device')
    card = torch.device(to) == CARD if to is not None else bool(mine)
    if any(o.device == CARD for o in rest): raise RuntimeError(f'a tensor without numbers: {f}')
    if mine and rest and name != 'copy_':
        if any(o.dim() for o in rest): raise RuntimeError(f'tensors on two devices: {f}')
        tell('number from the CPU')
    if card and kwargs.get('generator') is not None: raise RuntimeError(f'a CPU generator for the card: {f}')
    masks = name in ('index', 'index_put_', 'index_put', '_index_put_impl_') and any(o is not None and o.dtype in (torch.bool, torch.uint8) for o in args[1])
    wait = bool(mine) and (name in WAITS or masks)
    if name == '_to_copy' and on(args[0]) != card or name == 'copy_' and on(args[0]) != on(args[1]):
        later = kwargs.get('non_blocking') or name == 'copy_' and len(args) > 2 and args[2]
        if later and not (card if name == '_to_copy' else on(args[0])): raise RuntimeError(f'a number read before it is there: {f}, non_blocking to the host')
        source = args[0] if name == '_to_copy' else args[1]
        wait = not (later and getattr(source, 'pinned_', False))
    if wait: tell('wait')
    if (mine or card) and not is_view(f) and Card.now: Card.now.launches += 1
    if name in ('_local_scalar_dense', 'equal'): card = False
    if name == 'copy_': card = on(args[0])
    back = {id(o.real_): o for o in mine}
    if to is not None: kwargs = {**kwargs, 'device': 'cpu'}
    kwargs = {k: v for k, v in kwargs.items() if not (k == 'pin_memory')} if card else kwargs
    with Card.now.own_numbers() if card and Card.now and torch.Tag.nondeterministic_seeded in f.tags else nullcontext():
        out = f(*tree_map(lambda o: o.real_ if on(o) else o, args), **tree_map(lambda o: o.real_ if on(o) else o, kwargs))
    if card and any(isinstance(o, torch.Tensor) and o.dtype == torch.float64 for o in tree_leaves(out)): tell('float64') # which Apple's have not
    return tree_map(lambda o: back.get(id(o)) if id(o) in back else OnCard(o) if card and isinstance(o, torch.Tensor) else o, out)


class Card(TorchDispatchMode):
    "While it is in force: `events` counts (what, where), `launches` the kernels."
    now = None
    def __init__(self):
        super().__init__()
        self.events, self.launches, self.rng = Counter(), 0, torch.Generator().manual_seed(1).get_state()
    def __torch_dispatch__(self, f, types, args=(), kwargs=None): return execute(f, args, kwargs or {})
    @contextmanager
    def own_numbers(self):
        "A card's random numbers are not the CPU's."
        host = torch.get_rng_state()
        torch.set_rng_state(self.rng)
        try: yield
        finally:
            self.rng = torch.get_rng_state()
            torch.set_rng_state(host)
    @property
    def waits(self): return sum(n for (kind, _), n in self.events.items() if kind == 'wait')
    def of(self, kind): return {place: n for (k, place), n in self.events.items() if k == kind}


F = torch.nn.functional
LOW = {F.linear, F.conv2d, F.conv_transpose2d, F.bilinear, torch.conv2d, torch.conv_transpose2d, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__,
       torch.Tensor.mm, torch.Tensor.bmm}
class Autocast(TorchFunctionMode):
    "torch.autocast for the card: what multiplies matrices does it in 16 bits."
    depth = [] # one entry for each autocast in force: its dtype, or None
    def __torch_function__(self, f, types, args=(), kwargs=None):
        dtype = Autocast.depth[-1] if Autocast.depth else None
        if dtype and f in LOW: args, kwargs = tree_map(lambda o: o.to(dtype) if on(o) and o.dtype == torch.float32 else o, (args, kwargs or {}))
        return f(*args, **(kwargs or {}))


def _autocast(real):
    class autocast:
        def __init__(self, kind, dtype=None, enabled=True, **kwargs):
            self.inner = None if torch.device(kind) == CARD else real(kind, dtype=dtype, enabled=enabled, **kwargs)
            self.dtype, self.modes = (dtype or torch.float16) if enabled else None, []
        def __enter__(self):
            if self.inner: return self.inner.__enter__()
            Autocast.depth.append(self.dtype)
            if len(Autocast.depth) == 1:
                self.modes.append(Autocast()); self.modes[-1].__enter__()
            return self
        def __exit__(self, *args):
            if self.inner: return self.inner.__exit__(*args)
            Autocast.depth.pop()
            if self.modes: self.modes.pop().__exit__(*args)
    return autocast


@contextmanager
def a_card():
    "A `Card` in force, with fastai and PyTorch told of it."
    subclass, tensor, as_tensor = torch.Tensor.as_subclass, torch.tensor, torch.as_tensor
    def made(f): return lambda *args, device=None, **kwargs: f(*args, **kwargs) if device is None else f(*args, **kwargs).to(device) # PyTorch does so unseen
    def pin_memory(t, *args):
        t = t.clone()
        t.pinned_ = True
        return t
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, 'autocast', _autocast(torch.autocast))
        m.setattr(torch.Tensor, 'as_subclass', lambda t, cls: t if cls is OnCard else subclass(t, cls)) # fastai retains types
        m.setattr(torch.Tensor, 'pin_memory', pin_memory)
        for o in [o for k, o in sys.modules.items() if k.startswith(('torch.optim.', 'torch.utils._foreach'))]: # the fused optimizers
            if hasattr(o, '_get_fused_kernels_supported_devices'): m.setattr(o, '_get_fused_kernels_supported_devices', lambda: ['cpu', 'meta'])
        m.setattr(torch, 'tensor', made(tensor))
        m.setattr(torch, 'as_tensor', made(as_tensor))
        m.setattr(torch.Tensor, 'new_tensor', lambda t, data, dtype=None, device=None, **kw: tensor(data, dtype=dtype or t.dtype, **kw).to(device or t.device))
        m.setattr(fc.defaults, 'use_cuda', None)
        torch.__future__.set_swap_module_params_on_conversion(True)
        only = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with Card() as c:
                Card.now = c
                yield c
        finally:
            Card.now, Autocast.depth[:] = None, []
            torch._C._set_only_lift_cpu_tensors(only)
            torch.__future__.set_swap_module_params_on_conversion(False)
