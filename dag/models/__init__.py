"""Model families behind `dag.chain.policy.Policy`, one module each. Only this package imports diffusers."""

from dag.quiet import quieten

quieten()
