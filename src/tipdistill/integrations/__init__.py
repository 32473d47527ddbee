"""The seams to other projects: each module names every private thing of one engine that we touch."""
