"""Every private name of torch that the package needs, each with its reason.

Checked on torch 2.11 and 2.13; nothing outside this folder imports one.
"""
