"""`python -m sdft_ray.cli`, for places where the `sdft` script is not on the path."""

from sdft_ray.cli.app import main

if __name__ == "__main__":
    main()
