"""Finds, in the source of tests, what compares outputs or gradients bit for bit.

An output is what calling an object gives (`model(x)`, `restored(...)(x)`, `layers[0](x)`), a
product of matrices, a gradient, and what is made of these by names, containers, tensor methods
and functions that return them. The search follows names and not types: it may miss an output, and
`PERTURB=1` (see `tests.processors`) is the other half of the rule.
"""

import ast
from dataclasses import dataclass, field

#: Calls that compare exactly, by the last part of their name.
EXACT = {"same_bits", "equal", "array_equal", "assert_array_equal", "assert_equal"}
#: Functions of torch that compute or return products and gradients.
PRODUCTS = {
    *("linear", "conv1d", "conv2d", "conv3d", "bilinear", "einsum", "matmul", "mm", "bmm", "mv"),
    *("scaled_dot_product_attention", "functional_call", "grad", "cross_entropy", "mse_loss"),
}
#: Attributes that hold something which is called as a module is.
MODULES = {"model", "module", "compiled", "body", "head", "inner", "layer", "forward"}
#: Methods whose result holds the values of the tensor or container that they are called on.
VALUES = {
    *("clone", "detach", "contiguous", "float", "double", "half", "bfloat16", "to", "cpu"),
    *("numpy", "item", "tolist", "full_tensor", "to_local", "view", "reshape", "flatten", "t"),
    *("sum", "mean", "square", "abs", "max", "min", "norm", "sqrt", "div", "mul", "add", "sub"),
    *("values", "items", "get", "pop", "copy", "unsqueeze", "squeeze", "transpose", "argmax"),
}
#: Functions whose result holds the values of their arguments.
CONTAINERS = {"list", "tuple", "dict", "zip", "sorted", "reversed", "float", "bits_of", "next"}
FUNCTIONS = (ast.FunctionDef, ast.Lambda)


def exact_comparisons(source, helpers=frozenset()):
    """The lines that compare bit for bit what is not promised so, each with its text.

    Args:
        source: the text of a module of tests.
        helpers: imported functions that return outputs, from `returning_outputs`.
    """
    module = _Module(ast.parse(source), set(helpers))
    return sorted({(node.lineno, ast.unparse(node)) for node in module.comparisons()})


def raw_comparisons(source):
    """The lines that compare tensors exactly by other means than `same_bits`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return sorted(
        (node.lineno, ast.unparse(node))
        for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr == "equal"
    )


def returning_outputs(source, helpers=frozenset()):
    """The names of a module's functions and methods that return outputs."""
    return _Module(ast.parse(source), set(helpers)).returning - set(helpers)


@dataclass
class _Module:
    """The functions of a module, with the names in each that hold outputs."""

    tree: ast.Module
    returning: set
    outputs: dict = field(default_factory=dict)

    def __post_init__(self):
        self.parents = {c: n for n in ast.walk(self.tree) for c in ast.iter_child_nodes(n)}
        self.scopes = [n for n in ast.walk(self.tree) if isinstance(n, (ast.Module, *FUNCTIONS))]
        self.outputs = {scope: set() for scope in self.scopes}
        self.locals = {scope: _local_names(scope) for scope in self.scopes}
        before = None
        while before != (before := self._known()):
            for node in ast.walk(self.tree):
                self._bind(node)

    def comparisons(self):
        """The calls and operators that compare an output exactly."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _name(node.func) in EXACT:
                operands = [*node.args, getattr(node.func, "value", node.func)]
                if any(map(self.is_output, operands)):
                    yield node
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                operands = [node.left, *node.comparators]
                if any(map(self.is_output, operands)) and not any(map(_harmless, operands)):
                    yield node

    def is_output(self, node):
        """Whether an expression holds an output."""
        match node:
            case ast.Name(id=name):
                return any(name in self.outputs[scope] for scope in self._around(node))
            case ast.Attribute(attr=attribute, value=value):
                return attribute == "grad" or (attribute in ("T", "data") and self.is_output(value))
            case ast.Call():
                return self._call_gives_output(node)
            case ast.BinOp(op=ast.MatMult()):
                return True
            case ast.GeneratorExp(elt=part) | ast.ListComp(elt=part) | ast.SetComp(elt=part):
                return self.is_output(part)
            case ast.DictComp(value=part) | ast.Starred(value=part) | ast.Subscript(value=part):
                return self.is_output(part)
            case ast.BinOp() | ast.UnaryOp() | ast.Tuple() | ast.List() | ast.Dict() | ast.IfExp():
                return any(map(self.is_output, ast.iter_child_nodes(node)))
        return False

    def _call_gives_output(self, node):
        name, arguments = _name(node.func), any(map(self.is_output, node.args))
        match node.func:
            case ast.Name():
                if name in CONTAINERS:
                    return arguments
                return name in self.returning or self._is_object(node.func)
            case ast.Attribute(value=ast.Name(id="torch" | "F" | "np")):
                return name in PRODUCTS or arguments
            case ast.Attribute(value=value):
                called = name in MODULES | PRODUCTS | self.returning
                return called or (name in VALUES and self.is_output(value))
        return True

    def _is_object(self, name):
        """Whether what is called by a name is an argument or was assigned: no def, no import."""
        return any(name.id in self.locals[scope] for scope in self._around(name))

    def _bind(self, node):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind_target(target, value)
            case (
                ast.AugAssign(target=target, value=value)
                | ast.NamedExpr(target=target, value=value)
            ):
                self._bind_target(target, value)
            case (
                ast.For(target=target, iter=values) | ast.comprehension(target=target, iter=values)
            ):
                self._bind_items(target, values)
            case ast.Return(value=value) | ast.Yield(value=value) if self.is_output(value):
                function = next(s for s in self._around(node) if s is not node)
                self.returning.add(getattr(function, "name", ""))
            case ast.Call(func=ast.Attribute(attr="append" | "extend" | "update", value=value)):
                if any(map(self.is_output, node.args)):
                    self._add(value)

    def _bind_target(self, target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._bind_target(one, other)
        elif self.is_output(value):
            self._add(target)

    def _bind_items(self, target, values):
        """Binds what a loop takes from a container: of `zip` and `items` each part by itself."""
        name = _name(values.func) if isinstance(values, ast.Call) else ""
        parts = target.elts if isinstance(target, ast.Tuple) else []
        if name == "zip" and len(parts) == len(values.args):
            for part, value in zip(parts, values.args, strict=True):
                self._bind_target(part, value)
        elif name in ("items", "enumerate") and len(parts) == 2:
            source = values.func.value if name == "items" else values.args[0]
            self._bind_target(parts[1], source)
        else:
            self._bind_target(target, values)

    def _add(self, target):
        if isinstance(target, ast.Name):
            self.outputs[next(iter(self._around(target)))].add(target.id)
        elif isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._add(part)
        elif isinstance(target, ast.Subscript | ast.Starred):
            self._add(target.value)

    def _around(self, node):
        """The function that a node is in, those around it, and the module."""
        while node in self.parents:
            node = self.parents[node]
            if node in self.outputs:
                yield node

    def _known(self):
        return sum(map(len, self.outputs.values())) + len(self.returning)


def _local_names(scope):
    """The arguments of a function and the names that it assigns, without its own functions."""
    if isinstance(scope, ast.Module):
        return set()
    inner = {n.name for n in ast.walk(scope) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    stored = {
        n.id for n in ast.walk(scope) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    arguments = scope.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return (stored | {argument.arg for argument in named}) - inner


def _name(node):
    """The last part of a name: `equal` of `torch.equal`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _harmless(node):
    """Whether comparing with this is exact on every processor, or not exact."""
    approximate = isinstance(node, ast.Call) and _name(node.func) == "approx"
    return approximate or (isinstance(node, ast.Constant) and node.value in (0, None))
