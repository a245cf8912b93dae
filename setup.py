"Read the dependency lists of settings.ini; all else is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser()
settings.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
lists = {k: v.split('\n')[1:] for k, v in settings['DEFAULT'].items() if k.endswith('requirements')}
setup(install_requires=lists.pop('requirements'),
      extras_require={k.removesuffix('_requirements'): v for k, v in lists.items()})
