"""`python -m nvembed_deploy`: the same as `nvembed`."""

from nvembed_deploy.cli.main import main

raise SystemExit(main())
