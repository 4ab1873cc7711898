"""`python -m imagine_opd`: the command line."""

from imagine_opd.cli import main

raise SystemExit(main())
