"""Bench: what the stages cost, beside their peers on the same work; results are JSON files, tables are made of them.

head    score + select + loss, forward and backward, of two lm_heads
step    a whole training step of real architectures with random weights
select  the rules alone, at growing numbers of tokens
table   the Markdown tables of README.md and docs/, from the results
"""
