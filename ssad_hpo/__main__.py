"""`python -m ssad_hpo` is `ssad-hpo`."""

from ssad_hpo.cli import main

main()
