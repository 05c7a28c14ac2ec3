"""This library inside others' models. Each module needs the package it integrates with, and its extra."""
