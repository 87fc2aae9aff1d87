"""The type checker that the tests run with: beartype, which jaxtyping asks about shapes."""

from beartype import BeartypeConf, beartype

# As in PEP 484, an int is a float.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
