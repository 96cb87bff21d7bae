"""Colours, type and spacing: calm in light and dark, readable by everyone, no font from the network."""

from __future__ import annotations

import gradio as gr

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """The app's look; the rest is in ``assets/app.css``."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        secondary_hue=gr.themes.colors.orange,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
        font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#151413",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1f1e1c",
        block_border_width="1px",
        block_border_color="#e4e0da",
        block_border_color_dark="#3a3733",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="600",
        block_shadow="none",
        button_primary_background_fill="#0067a3",
        button_primary_background_fill_hover="#005486",
        button_primary_background_fill_dark="#0067a3",
        button_primary_background_fill_hover_dark="#0b7cc0",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        slider_color="#0072b2",
        slider_color_dark="#56b4e9",
        body_text_color_subdued="#5f5a53",
        body_text_color_subdued_dark="#b8b2a9",
        color_accent="#0067a3",
        checkbox_background_color_selected="#0067a3",
        checkbox_border_color_selected="#0067a3",
        checkbox_background_color_selected_dark="#0072b2",
        link_text_color="#0067a3",
        link_text_color_hover="#004a75",
        link_text_color_visited="#0067a3",
        link_text_color_active="#004a75",
        link_text_color_dark="#6cc0f0",
        link_text_color_hover_dark="#a5d9f8",
        link_text_color_visited_dark="#6cc0f0",
        link_text_color_active_dark="#a5d9f8",
        block_title_text_color="#3f3b37",
        block_title_text_color_dark="#d9d4cc",
        block_info_text_color="#5f5a53",
        block_info_text_color_dark="#b8b2a9",
    )
