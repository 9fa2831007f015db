"""What is known of engines and devices: `nvembed show`.

In a wheel these modules live in `nvembed_deploy.engines`: their name is too common for a site-packages folder. Classes
that others catch or compare are in `nvembed_deploy`.
"""
