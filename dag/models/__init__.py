"""Model families behind `dag.protocols.Policy`, one module each. Only this package imports diffusers."""

from dag.quiet import quieten

quieten()
