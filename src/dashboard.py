"""Create the project's workspace and report in W&B: python -m src.dashboard --project tprl."""

if __name__ == "__main__":
    from tprl.integrations.dashboard import main

    main()
