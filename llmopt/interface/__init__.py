"""What a model takes and gives: roles, ports, signatures, facts and the arrays they name."""
