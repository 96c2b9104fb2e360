"""Write questions made by rule: tasks of lm-eval for tests, and patterns for your own.

    python tests/make_questions.py tests/demo/tasks

writes for each rule a .jsonl of {"question", "choices", "answer"}, and a .yaml that makes
a task of it. Each time the same questions come out. From this project's folder:

    python quant_lab.py --demo --tasks colors --tasks-path tests/demo/tasks

For questions of your own write such a .jsonl, and copy a .yaml with another name and path.
"""

import json
import random
import sys
from pathlib import Path
from string import ascii_uppercase as LETTERS

COUNT = 200
CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITTEN = """task: {name}_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} Write the number, and nothing else."
doc_to_target: answer
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 32}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - name: last_number
    filter:
      - {{function: regex, regex_pattern: '(\\d+)', group_select: -1}}
      - {{function: take_first}}
"""
NAMES = "Anna Ben Clara David Emma Frank Grace Henry Irene Jack".split()
COLORS = "red blue green yellow black white brown pink".split()
THINGS = "ball kite book lamp chair cup hat bag".split()


def arithmetic(draw: random.Random) -> tuple[str, list[str], str]:
    a, b = draw.randint(2, 40), draw.randint(2, 40)
    near = draw.sample([n for n in range(-10, 11) if n and a + b + n > 0], 3)
    return f"What is {a} + {b}?", [str(a + b + n) for n in near], str(a + b)


def alphabet(draw: random.Random) -> tuple[str, list[str], str]:
    begin = draw.randrange(18)
    end = draw.randrange(begin + 4, 23)
    a, b, c = LETTERS[end : end + 3]
    question = f"Say the alphabet in order: {' '.join(LETTERS[begin:end])}"
    return question, [f"{b} {a} {c}", f"{a} {c} {b}", f"{c} {b} {a}"], f"{a} {b} {c}"


def recall(draw: random.Random) -> tuple[str, list[str], str]:
    codes = {name: str(draw.randint(1000, 9999)) for name in draw.sample(NAMES, 4)}
    facts = [f"The code of {name} is {code}." for name, code in codes.items()]
    name = draw.choice([*codes])
    question = " ".join([*facts, f"What is the code of {name}?"])
    code = codes.pop(name)
    return question, [*codes.values()], code


def colors(draw: random.Random) -> tuple[str, list[str], str]:
    names, things = draw.sample(NAMES, 2), draw.sample(THINGS, 2)
    mine, other, *rest = draw.sample(COLORS, 4)
    facts = [
        f"The {things[0]} of {names[0]} is {mine}.",
        f"The {things[1]} of {names[1]} is {other}.",
    ]
    draw.shuffle(facts)
    question = " ".join([*facts, f"What color is the {things[0]} of {names[0]}?"])
    return question, [other, *rest], mine


def make(rule) -> list[dict]:
    draw, questions = random.Random(f"{rule.__name__} 42"), []
    while len(questions) < COUNT:
        question, others, answer = rule(draw)
        choices = [*others, answer]
        draw.shuffle(choices)
        questions.append(dict(question=question, choices=choices, answer=answer))
    return questions


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for rule in (arithmetic, alphabet, recall, colors):
        name, file = rule.__name__, folder / f"{rule.__name__}.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in make(rule)))
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=file))
        if rule is arithmetic:
            text = WRITTEN.format(name=name, file=file)
            (folder / f"{name}_written.yaml").write_text(text)
