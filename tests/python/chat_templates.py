"""What Hugging Face's `apply_chat_template` makes of the conversations in FOLDER/cases.json with each FOLDER/*.jinja.

    python chat_templates.py FOLDER > FOLDER/golden.jsonl

The environment is the one that `transformers` sets up (utils/chat_template_utils.py): Jinja2's immutable sandbox with
trimmed blocks, loop controls, `raise_exception`, `strftime_now`, its own `tojson`, and `{% generation %}`. Needs jinja2,
which `scripts/setup --test` puts into target/venv. The moment is fixed: 2024-07-25 08:05:09 UTC.
"""
import datetime
import json
import pathlib
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

NOW = datetime.datetime(2024, 7, 25, 8, 5, 9, tzinfo=datetime.timezone.utc)


class Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: renders what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env


def render(template, case):
    context = {
        "messages": case["messages"],
        "tools": case.get("tools"),
        "documents": case.get("documents"),
        "add_generation_prompt": case.get("add_generation_prompt", True),
        "bos_token": "<s>",
        "eos_token": "</s>",
        **case.get("variables", {}),
    }
    try:
        return {"text": template.render(**context)}
    except jinja2.exceptions.TemplateError as error:
        # The sandbox's own errors are of this family, too, and have other words in other implementations.
        raised = type(error) is jinja2.exceptions.TemplateError
        return {"raises": str(error)} if raised else {"fails": True}
    except Exception:
        return {"fails": True}


def main(folder):
    cases = json.loads((folder / "cases.json").read_text())
    for path in sorted(folder.glob("*.jinja")):
        template = environment().from_string(path.read_text())
        for name, case in cases.items():
            print(json.dumps({"template": path.stem, "case": name, **render(template, case)}, ensure_ascii=False))


main(pathlib.Path(sys.argv[1]))
