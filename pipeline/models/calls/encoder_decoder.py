from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

directory = "DIRECTORY"  # where this file lies, or a name on the hub
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForSeq2SeqLM.from_pretrained(directory)

chat = [{"role": "user", "content": "How do I plant a bean?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0], skip_special_tokens=True))
