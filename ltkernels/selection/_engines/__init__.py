"""The engines of a greedy selection; `selection._driver` chooses one and says what it must be able to do."""
