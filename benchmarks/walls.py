"""Counts what keeps the code readable, and enforces nothing. Run: make walls

Names defined at the top of two modules or more, tokens (names, numbers, operators) a line
of functions without their docstrings, lengths of functions, comments a thousand lines of code.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

COUNTED = (tokenize.NAME, tokenize.NUMBER, tokenize.OP)


def top_level_names(tree):
    """Public names that a module defines, imports left out."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [
                target.id for target in node.targets if isinstance(target, ast.Name)
            ]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def docstring_lines(node):
    """Line numbers of a function's docstring."""
    first = node.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if text and isinstance(first.value.value, str):
        return set(range(first.lineno, first.end_lineno + 1))
    return set()


def measured_functions(source, tree):
    """(lines, tokens) of every function, without docstrings, comments and blank lines."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    counted = [token.start[0] for token in tokens if token.type in COUNTED]
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        inside = set(range(node.lineno, node.end_lineno + 1)) - docstring_lines(node)
        code = {
            number
            for number in inside
            if lines[number - 1].strip()
            and not lines[number - 1].strip().startswith("#")
        }
        yield len(code), sum(number in code for number in counted)


def comment_share(source):
    """Comments, and lines of code."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = sum(token.type == tokenize.COMMENT for token in tokens)
    code = {token.start[0] for token in tokens if token.type in COUNTED}
    return comments, len(code)


def main(folder):
    """Print the counts of one package."""
    homes, functions, comments, code = defaultdict(list), [], 0, 0
    for file in sorted(Path(folder).rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        for name in dict.fromkeys(top_level_names(tree)):
            homes[name].append(str(file.relative_to(folder)))
        functions += measured_functions(source, tree)
        more, lines = comment_share(source)
        comments, code = comments + more, code + lines
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    lengths, tokens = zip(*functions, strict=True)
    print(f"public top-level names: {len(homes)}, defined twice: {len(twice)}")
    for name, files in sorted(twice.items()):
        print(f"  {name}: {', '.join(files)}")
    print(f"tokens a line of functions: {sum(tokens) / sum(lengths):.1f}")
    deciles = statistics.quantiles(lengths, n=10)
    print(
        f"lines of a function: median {statistics.median(lengths):.0f}, "
        f"90th percentile {deciles[8]:.0f}, most {max(lengths)}"
    )
    print(f"comments a thousand lines of code: {1000 * comments / code:.0f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "src/consilience")
