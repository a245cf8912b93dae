"Write README.md from nbs/index.ipynb: its text, its code, what the code printed, its pictures."
import base64, json
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = 'https://dglit.github.io/dglit'


def readme():
    "README.md's text, and its pictures as a dict of path to bytes."
    parts, pictures = [], {}
    for cell in json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(source.replace('.ipynb)', '.html)'))
            continue
        options = [line[2:].strip() for line in source.splitlines() if line.startswith('#|')]
        if 'hide' in options: continue
        if 'echo: false' not in options: parts.append(f'```python\n{source}\n```')
        caption = next((o.removeprefix('fig-cap: ') for o in options if o.startswith('fig-cap')), '')
        for out in cell['outputs']:
            data = out.get('data', {})
            if out['output_type'] == 'stream': parts.append('```\n' + ''.join(out['text']).rstrip() + '\n```')
            elif 'image/png' in data:
                path = f'nbs/images/readme-{len(pictures)}.png'
                pictures[path] = base64.b64decode(''.join(data['image/png']))
                parts.append(f'![{caption}]({path})\n\n*{caption}*')
            elif 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
    text = '\n\n'.join(parts) + '\n'
    for page in (ROOT/'nbs').glob('*.ipynb'): text = text.replace(f']({page.stem}.html)', f']({SITE}/{page.stem.split("_", 1)[-1]}.html)')
    return '<!-- Written from nbs/index.ipynb by docs/readme.py: edit the notebook. -->\n\n' + text, pictures


if __name__ == '__main__':
    text, pictures = readme()
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    for path, data in pictures.items():
        (ROOT/path).parent.mkdir(exist_ok=True)
        (ROOT/path).write_bytes(data)
