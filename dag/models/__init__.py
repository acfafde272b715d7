"""Model families that implement `dag.chain.policy.Policy`. Apart from `dag.assets.build`, only this package imports diffusers."""

from dag.quiet import quieten

quieten()
