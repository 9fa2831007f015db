"""`python -m app`: same as `nvembed app`."""

if __name__ == "__main__":
    from nvembed_deploy.app.command import main

    raise SystemExit(main(prog="python -m app"))
