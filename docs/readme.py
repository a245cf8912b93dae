"Write README.md from nbs/index.ipynb: its text, its code, what the code printed, its pictures."
import base64, json, re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme():
    "README.md's text, and its pictures as a dict of path to bytes."
    parts, pictures = [], {}
    for cell in json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(re.sub(r'\]\(([\w./]+\.ipynb)', r'](nbs/\1', source))
            continue
        options = [line[2:].strip() for line in source.splitlines() if line.startswith('#|')]
        if 'hide' in options: continue
        code = '\n'.join(line for line in source.splitlines() if not line.startswith('#|'))
        if 'echo: false' not in options: parts.append(f'```python\n{code}\n```')
        caption = next((o.removeprefix('fig-cap: ').strip('"') for o in options if o.startswith('fig-cap')), '')
        for out in cell['outputs']:
            data = out.get('data', {})
            if out['output_type'] == 'stream': parts.append('```\n' + ''.join(out['text']).rstrip() + '\n```')
            elif 'image/png' in data:
                path = f'nbs/images/readme-{len(pictures)}.png'
                pictures[path] = base64.b64decode(''.join(data['image/png']))
                parts.append(f'![{caption}]({path})\n\n*{caption}*')
            elif 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
    head = '<!-- Written from nbs/index.ipynb by docs/readme.py: edit the notebook. -->'
    return '\n\n'.join([head, *parts]) + '\n', pictures


def write_readme():
    text, pictures = readme()
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    for path, data in pictures.items():
        (ROOT/path).parent.mkdir(exist_ok=True)
        (ROOT/path).write_bytes(data)


if __name__ == '__main__': write_readme()
