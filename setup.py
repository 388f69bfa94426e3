"The package's metadata, all of it from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser()
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = here/'README.md'


def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]


setup(
    name=cfg['name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    license_expression=cfg['license'], keywords=cfg['keywords'], url=cfg['git_url'],
    project_urls=dict(Source=cfg['git_url'], Documentation=cfg['doc_url']),
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    python_requires='>=' + cfg['min_python'], install_requires=lines('requirements'),
    extras_require={k.removesuffix('_requirements'): lines(k) for k in cfg if k.endswith('_requirements')},
    packages=find_packages(include=['hyperflux', 'hyperflux.*']), package_data={'hyperflux': ['assets/**/*']},
    entry_points=dict(console_scripts=lines('console_scripts'), nbdev=[f"{cfg['name']} = hyperflux._modidx:d"]))
