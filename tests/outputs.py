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
#: Names of arguments that are called and give no outputs: of hypothesis, and the command line.
FIXTURES = {"draw", "pack", "run", "run_json"}
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
    scopes: dict = field(default_factory=dict)

    def __post_init__(self):
        self.nodes = list(ast.walk(self.tree))
        self._scope(self.tree, (self.tree,))
        functions = {scopes[0] for scopes in self.scopes.values()}
        self.outputs = {function: set() for function in functions}
        self.locals = {function: _local_names(function) for function in functions}
        before = None
        while before != (before := self._known()):
            for node in self.nodes:
                self._bind(node)

    def _scope(self, node, scopes):
        """Notes for all nodes the functions that they are in, the innermost first."""
        for child in ast.iter_child_nodes(node):
            self.scopes[child] = scopes
            self._scope(child, (child, *scopes) if isinstance(child, FUNCTIONS) else scopes)

    def comparisons(self):
        """The calls and operators that compare an output exactly."""
        for node in self.nodes:
            if isinstance(node, ast.Call) and _name(node.func) in EXACT:
                operands = [*node.args, getattr(node.func, "value", node.func)]
                if any(map(self.is_output, operands)) and not self._repeats(node):
                    yield node
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                operands = [node.left, *node.comparators]
                if any(map(self.is_output, operands)) and not any(map(_harmless, operands)):
                    yield node

    def _repeats(self, node):
        """Whether a node is in a function that is decorated with `repeatable()`."""
        decorators = [d for s in self.scopes[node] for d in getattr(s, "decorator_list", ())]
        return any(_name(d.func) == "repeatable" for d in decorators if isinstance(d, ast.Call))

    def is_output(self, node):
        """Whether an expression holds an output."""
        match node:
            case ast.Name(id=name):
                return any(name in self.outputs[scope] for scope in self.scopes[node])
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
        local = any(name.id in self.locals[scope] for scope in self.scopes[name])
        return local and name.id not in FIXTURES

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
                self.returning.add(getattr(self.scopes[node][0], "name", ""))
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
            self.outputs[self.scopes[target][0]].add(target.id)
        elif isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._add(part)
        elif isinstance(target, ast.Subscript | ast.Starred):
            self._add(target.value)

    def _known(self):
        return sum(map(len, self.outputs.values())) + len(self.returning)


def _local_names(scope):
    """The arguments of a function and what it assigns, without its functions and other names."""
    if isinstance(scope, ast.Module):
        return set()
    nodes = list(ast.walk(scope))
    inner = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assigned = [n for n in nodes if isinstance(n, ast.Assign)]
    renamed = {
        _name(n.targets[0])
        for n in assigned
        if isinstance(n.value, ast.Name | ast.Attribute | ast.IfExp)
    }
    arguments = {n.arg for n in nodes if isinstance(n, ast.arg)}
    return (stored | arguments) - inner - renamed


def _name(node):
    """The last part of a name: `equal` of `torch.equal`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _harmless(node):
    """Whether comparing with this is exact on every processor, or not exact."""
    approximate = isinstance(node, ast.Call) and _name(node.func) == "approx"
    return approximate or (isinstance(node, ast.Constant) and node.value in (0, None))
