"""Words, sentences and fonts that are found on any machine, in two parts that share none.

English comes from the docstrings of Python's own library, Chinese from a list of common words; fonts are those that the
system has, in scripts that they cover.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from real_networks.base import Missing

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts")
UNUSUAL = re.compile(r"math|symbol|emoji|dingbat|thin|extralight|icon|awesome|mt_?extra|italicmt", re.IGNORECASE)
CHINESE = """
我们 今天 明天 昨天 时间 工作 学习 生活 朋友 老师 学生 学校 公司 经济 社会 文化 历史 科学 技术
国家 中国 北京 上海 广州 城市 人民 政府 法律 问题 方法 研究 发展 世界 国际 市场 产品 价格 质量
服务 管理 信息 网络 电脑 手机 电话 号码 地址 姓名 日期 年龄 医院 医生 健康 安全 环境 保护 交通
汽车 火车 飞机 车站 机场 酒店 餐厅 饭店 商店 银行 邮局 公园 图书 新闻 电视 电影 音乐 体育 足球
天气 春天 夏天 秋天 冬天 太阳 月亮 星星 大海 高山 河流 森林 动物 植物 水果 苹果 香蕉 牛奶 咖啡
面包 米饭 鸡蛋 蔬菜 红色 绿色 蓝色 白色 黑色 父亲 母亲 孩子 家庭 房子 房间 厨房 客厅 桌子 椅子
开始 结束 进入 出口 入口 注意 禁止 欢迎 谢谢 您好 再见 请问 可以 不能 需要 应该 已经 正在 因为
所以 但是 如果 虽然 而且 或者 关于 通过 使用 说明 系统 软件 程序 数据 文件 打开 关闭 保存 删除
选择 确定 取消 返回 登录 注册 密码 用户 设置 帮助 更多 下载 更新 版本 语言 文字 图片 视频 声音
空间 大小 长度 重量 温度 速度 方向 左边 右边 上面 下面 前面 后面 里面 外面 附近 东方 西部 南京
北方 中心 中央 地区 省份 农村 土地 资源 能源 石油 电力 工业 农业 商业 贸易 合同 投资 企业 银河
教育 大学 考试 成绩 知识 能力 经验 思想 理论 实践 计划 目标 结果 原因 影响 关系 条件 情况 变化
提高 增加 减少
""".split()


@lru_cache
def sentences(part: int) -> tuple[str, ...]:
    """Find sentences of prose that only the modules of a part have."""
    other = set(_docstrings(1 - part))
    return tuple(sentence for sentence in _docstrings(part) if sentence not in other)


@lru_cache
def _docstrings(part: int) -> tuple[str, ...]:
    """Find sentences in the docstrings of the standard library's modules, every other module for a part."""
    found: dict[str, None] = {}
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in sources[part::2]:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
                for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
                    if 30 <= len(sentence) <= 250 and not re.search(r"[>=<_\[\]{}|*]{2}|>>>", sentence):
                        found[sentence] = None
    return tuple(found)


@lru_cache
def words(part: int) -> tuple[str, ...]:
    """Find English words; those of the other part are left out."""
    own, other = ({w for s in sentences(p) for w in re.findall(r"[A-Za-z]{3,11}", s)} for p in (part, 1 - part))
    both = sorted(own & other)[part::2]
    return tuple(sorted((own - other) | set(both)))


def chinese_words(part: int) -> tuple[str, ...]:
    """Return common Chinese words, every other one for a part."""
    return tuple(CHINESE[part::2])


@lru_cache
def fonts(part: int, chinese: bool = False) -> tuple[Path, ...]:
    """Find font files that have Latin letters, or Chinese characters; every other one for a part."""
    files = {
        path
        for folder in FONT_FOLDERS
        for path in Path(folder).expanduser().rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc") and not UNUSUAL.search(path.name)
    }
    suitable = [p for p in sorted(files, key=lambda p: p.name) if _covers(p, "中国数" if chinese else "AaRg9")]
    if len(suitable) < 2:
        script = "Chinese characters" if chinese else "Latin letters"
        raise Missing(f"fewer than two fonts with {script} on this machine (for example fonts-noto-cjk, fonts-dejavu)")
    return tuple(suitable[part::2])


def _covers(path: Path, text: str) -> bool:
    """Return whether a font draws each of some characters in its own way."""
    try:
        font = ImageFont.truetype(str(path), 20)
    except OSError:
        return False
    drawn = {bytes(font.getmask(character)) for character in text}
    return len(drawn) == len(text) and bytes(font.getmask("\uffff")) not in drawn


@lru_cache(maxsize=256)
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Load a font at a size in pixels."""
    return ImageFont.truetype(str(path), size)
